"""JobSets by their schemas, and how one is followed through a stand-in for kubectl."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from nanodlm.cluster import follow, settings
from nanodlm.cluster.kubernetes import jobset
from nanodlm.cluster.settings import Launch, Work
from nanodlm.config import PRESETS, load_config
from nanodlm.errors import NanodlmError
from nanodlm.stages.lookup import ready
from nanodlm.store import Store, hold_lease
from tests.cluster.conftest import BUCKET, CONFIG, INPUTS, NASTY, PODS, stand_in
from tests.support.commands import nanodlm

KUBERNETES = "1.30"  # in which podFailurePolicy and everything else that is used is stable or on by default


def fields(*required: str, **properties: Any) -> dict[str, Any]:
    """Schema of an object that has these fields and no others."""
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


def listed(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": items}


# What jobset.x-k8s.io/v1alpha2 documents of the fields that are used, and no others.
COUNT, SWITCH = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}, {"type": "boolean"}
REASONS = ["BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"]
RULE = fields(
    "action",
    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
    action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
    onJobFailureReasons=listed({"enum": REASONS}),
)
REPLICATED = fields(
    "name",
    "template",
    name={"type": "string", "pattern": "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"},
    replicas={"type": "integer", "minimum": 1},
    template={"type": "object"},
)
SPEC = fields(
    "replicatedJobs",
    network=fields(enableDNSHostnames=SWITCH, publishNotReadyAddresses=SWITCH),
    ttlSecondsAfterFinished=COUNT,
    failurePolicy=fields(maxRestarts=COUNT, rules=listed(RULE)),
    replicatedJobs=listed(REPLICATED),
)
JOBSET = fields(
    "apiVersion",
    "kind",
    "metadata",
    "spec",
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata={"type": "object"},
    spec=SPEC,
)


def the_job(manifest: dict[str, Any]) -> dict[str, Any]:
    """The Job that the JobSet controller makes of its template."""
    (replicated,) = manifest["spec"]["replicatedJobs"]
    name = f"{manifest['metadata']['name']}-{replicated['name']}-0"
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, **replicated["template"]}


def the_container(manifest: dict[str, Any]) -> dict[str, Any]:
    (container,) = the_job(manifest)["spec"]["template"]["spec"]["containers"]
    return container


@pytest.mark.parametrize("stage", ["train", "evaluate", "sample"])
@pytest.mark.parametrize(("launch", "store"), [(PODS, "/store/runs"), (BUCKET, "s3://bucket/store")])
def test_a_jobset_and_the_job_and_pods_in_it_are_as_kubernetes_defines_them(
    launch: Launch, store: str, stage: str
) -> None:
    manifest = jobset(Work(PRESETS["owt"], store, launch, stage, INPUTS, rebuild=True))
    jsonschema.validate(manifest, JOBSET)
    kubernetes_validate.validate(the_job(manifest), KUBERNETES, strict=True)
    assert yaml.safe_load(yaml.safe_dump(manifest)) == manifest


def test_pods_find_the_first_of_them_by_the_name_that_a_jobset_gives_it() -> None:
    manifest = jobset(Work(PRESETS["owt"], "/store", PODS))
    job, name = the_job(manifest)["spec"], manifest["metadata"]["name"]
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 4, 4)
    container = the_container(manifest)
    env = {entry["name"]: entry for entry in container["env"]}
    (replicated,) = manifest["spec"]["replicatedJobs"]
    pod = f"{name}-{replicated['name']}-0-0.{name}"  # JobSet, replicated job, its index, the pod's; subdomain: JobSet
    assert env["JAX_COORDINATOR_ADDRESS"]["value"] == f"{pod}:{settings.PORT}"
    assert env["JAX_NUM_PROCESSES"]["value"] == "4"
    assert "job-completion-index" in env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    alone = the_container(jobset(Work(PRESETS["owt"], "s3://bucket/store", BUCKET)))
    assert not [entry for entry in alone["env"] if entry["name"].startswith("JAX_")]


def test_a_jobset_holds_the_configuration_no_secret_and_the_graces_that_were_asked_for() -> None:
    manifest = jobset(Work(NASTY, "/store", PODS))
    pod, container = the_job(manifest)["spec"]["template"]["spec"], the_container(manifest)
    assert load_config(container["args"][0].replace("$$", "$")) == NASTY  # as Kubernetes makes of it
    assert "$(HOME)" not in container["args"][0].replace("$$(HOME)", "")
    assert container["envFrom"] == [{"secretRef": {"name": "bucket"}}]
    assert (pod["terminationGracePeriodSeconds"], manifest["spec"]["failurePolicy"]["maxRestarts"]) == (300, 3)
    assert pod["securityContext"]["runAsNonRoot"]


def test_the_command_of_a_job_is_one_that_nanodlm_takes_and_it_looks_at_no_source(tmp_path: Path) -> None:
    """A command line that it does not take would end with 2."""
    config = CONFIG.replace(data={"source": str(tmp_path / "missing.txt")})
    container = the_container(jobset(Work(config, "/store", PODS, inputs=INPUTS, rebuild=True)))
    words = [*container["command"], *container["args"]]
    words[words.index("/store")] = str(tmp_path / "store")
    done = nanodlm(*words[words.index("nanodlm") + 1 :])
    assert (done.returncode, "no artifact at shard/ab12" in done.stderr) == (1, True), done.stderr


KUBECTL = """
echo "$@" >> {folder}/calls
case "$1" in
    create) cat > {folder}/manifest.json ;;
    get) if [ -f {folder}/manifest.json ]; then cat {folder}/status.json; else echo NotFound >&2; exit 1; fi ;;
    delete) case "$*" in *--cascade=foreground*) rm -f {folder}/manifest.json ;; esac ;;
    logs) echo "nanodlm: the loss is not a number" ;;
esac
"""


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a stand-in for kubectl keeps what it is given and finds its answers: no cluster is here."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(follow, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(follow, "ASK_SECONDS", 0.1)
    monkeypatch.setattr(follow, "SETTLE_SECONDS", 0.2)
    monkeypatch.setattr(settings, "MOUNT", str(tmp_path))
    stand_in(tmp_path, "kubectl", KUBECTL.format(folder=tmp_path))
    return tmp_path


@pytest.fixture
def store(kubectl: Path, prepared: Path) -> Store:
    """Data on the volume that pods share."""
    shutil.copytree(prepared, kubectl / "store")
    return Store(f"{kubectl}/store")


FAILED = {"conditions": [{"type": "Failed", "status": "True", "message": "too many"}]}
COMPLETED = {"conditions": [{"type": "Completed", "status": "True", "message": "all of them"}]}


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (COMPLETED, "ended without a train artifact"),
        (FAILED, "did not finish: the loss is not a number; run again to continue"),
    ],
)
def test_a_jobset_that_ends_without_its_artifact_is_an_error_and_its_pods_are_kept_to_look_at(
    kubectl: Path, store: Store, status: dict[str, Any], message: str
) -> None:
    (kubectl / "status.json").write_text(json.dumps({"metadata": {}, "status": status}))
    with pytest.raises(NanodlmError, match=message):
        follow.run_on_cluster(ready("train", CONFIG, store), CONFIG, store, PODS)
    calls = (kubectl / "calls").read_text().splitlines()
    created = calls.index("create --filename=-")
    assert not [call for call in calls[created:] if call.startswith("delete")]
    manifest = json.loads((kubectl / "manifest.json").read_text())
    assert any(manifest["metadata"]["name"] in call for call in calls[created:])


def test_a_jobset_that_runs_is_found_again_and_one_that_has_ended_makes_room(kubectl: Path) -> None:
    calls = kubectl / "calls"

    def submitted(status: dict[str, Any]) -> tuple[bool, list[str]]:
        (kubectl / "status.json").write_text(json.dumps({"metadata": {}, **status}))
        calls.unlink(missing_ok=True)
        job = follow.SCHEDULERS["k8s"].submit(Work(CONFIG, f"{kubectl}/store", PODS, inputs=INPUTS))
        words = [call.split()[0] for call in calls.read_text().splitlines()]
        return job.found, [word for word in dict.fromkeys(words) if word != "logs"]

    assert submitted({}) == (False, ["get", "create"])
    assert submitted({"status": {"restarts": 1}}) == (True, ["get"])
    assert submitted({"status": FAILED}) == (False, ["get", "delete", "create"])
    assert submitted({"metadata": {"deletionTimestamp": "now"}}) == (False, ["get", "delete", "create"])


class Interrupted(BaseException):
    pass


def test_an_interrupted_wait_deletes_the_jobset(kubectl: Path, store: Store) -> None:
    (kubectl / "status.json").write_text('{"metadata": {}}')
    lookup = ready("train", CONFIG, store)

    def emit(kind: str, **fields: Any) -> None:
        if kind == "progress":
            raise Interrupted

    with hold_lease(store, "train", lookup.fingerprint) as lease:
        lease["events"] = {"progress": {"done": 1, "total": 2, "unit": "updates"}}
        store.write_json(store.path("train", lookup.fingerprint, "lease.json"), lease)
        with pytest.raises(Interrupted):
            follow.run_on_cluster(lookup, CONFIG, store, PODS, emit=emit)
    name = Work(CONFIG, store.uri(), PODS).name
    assert (kubectl / "calls").read_text().splitlines()[-1].startswith(f"delete jobset {name} ")
