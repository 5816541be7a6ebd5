"""Scripts and manifests of jobs by their schemas, and what is refused; `test_slurm` runs jobs."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from pydantic import ValidationError

from nanodlm.cluster import follow, settings
from nanodlm.cluster.kubernetes import jobset
from nanodlm.cluster.settings import Launch, Work
from nanodlm.cluster.slurm import slurm_script
from nanodlm.config import PRESETS, load_config
from nanodlm.errors import NanodlmError, UsageError
from nanodlm.stages.lookup import ready
from nanodlm.store import Store, hold_lease
from tests.cluster.conftest import CONFIG
from tests.support.commands import environment, nanodlm

NASTY = PRESETS["demo"].replace(sample={"prompt": 'it\'s $(HOME) `id` $PATH \\ "é"\nCONFIG\n$$'})
SLURM = Launch(target="slurm", nodes=2, gpus_per_node=0)
GPUS = Launch(target="slurm", nodes=4, gpus_per_node=8, cpus_per_task=6, memory_gb=512, time_limit=600,
              partition="gpu,big", account="lab", grace_seconds=300)  # fmt: skip
PODS = Launch(target="k8s", nodes=4, gpus_per_node=8, cpus_per_task=96, memory_gb=512, image="registry.local/nanodlm:1",
              namespace="research", queue="gpus", store_volume="shared", secret="bucket", service_account="trainer",
              grace_seconds=300, restarts=5)  # fmt: skip
BUCKET = Launch(target="k8s", image="registry.local/nanodlm:1")
KUBERNETES = "1.30"  # in which podFailurePolicy and everything else that is used is stable or on by default
INPUTS = {"shard": "ab12", "tokenizer": "cd34"}


# The Slurm script


def options(script: str) -> dict[str, str]:
    """What its #SBATCH lines say."""
    lines = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script, re.MULTILINE)
    assert len(lines) == script.count("#SBATCH")
    return dict(lines)


def test_a_script_asks_slurm_for_a_task_for_each_gpu_and_for_a_signal_before_the_end() -> None:
    asked = options(slurm_script(Work(CONFIG, "/shared/store", GPUS)))
    assert {k: v for k, v in asked.items() if k not in ("job-name", "output")} == {
        "nodes": "4", "ntasks-per-node": "8", "gpus-per-node": "8", "cpus-per-task": "6", "mem": "512G", "time": "600",
        "partition": "gpu,big", "account": "lab", "signal": "TERM@300", "open-mode": "append", "requeue": "",
    }  # fmt: skip
    alone = options(slurm_script(Work(CONFIG, "/shared/store", GPUS, stage="sample")))
    assert (alone["nodes"], alone["ntasks-per-node"]) == ("1", "1")


def stand_in(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (75, True)])
def test_a_script_hands_the_configuration_on_unchanged_and_requeues_only_what_a_signal_ended(
    tmp_path: Path, code: int, requeued: bool
) -> None:
    """srun and scontrol are replaced by what writes down how they are called."""
    stand_in(tmp_path, "srun", f'printf "%s\\0" "$@" > {tmp_path}/srun.said; exit {code}')
    stand_in(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/scontrol.said')
    script = slurm_script(Work(NASTY, f"{tmp_path}/a store", GPUS, inputs=INPUTS, rebuild=True))
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    env = environment(PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID="17")
    assert subprocess.run(["bash"], input=script, text=True, env=env, check=False).returncode == code
    words = (tmp_path / "srun.said").read_text().split("\0")[:-1]
    at = words.index("nanodlm")
    assert words[at + 1] == "train"
    assert load_config(words[at + 2]) == NASTY
    told = ["--inputs", "shard=ab12", "tokenizer=cd34"]
    assert words[at + 3 :] == ["--store", f"{tmp_path}/a store", *told, "--rebuild"]
    said = tmp_path / "scontrol.said"
    assert (said.read_text() == "requeue 17\n") if requeued else not said.exists()


def test_the_command_of_a_job_is_one_that_nanodlm_takes_and_it_looks_at_no_source(tmp_path: Path) -> None:
    """A command line that it does not take would end with 2."""
    config = CONFIG.replace(data={"source": str(tmp_path / "missing.txt")})
    container = the_container(jobset(Work(config, "/store", PODS, inputs=INPUTS, rebuild=True)))
    words = [*container["command"], *container["args"]]
    words[words.index("/store")] = str(tmp_path / "store")
    done = nanodlm(*words[words.index("nanodlm") + 1 :])
    assert (done.returncode, "no artifact at shard/ab12" in done.stderr) == (1, True), done.stderr


# The JobSet


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


def test_the_schemas_refuse_what_is_misspelt() -> None:
    manifest = jobset(Work(PRESETS["owt"], "/store", PODS))
    job = the_job(manifest)
    job["spec"]["template"]["spec"]["terminationGracePeriod"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, KUBERNETES, strict=True)
    manifest["spec"]["failurePolicy"]["maxRestart"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, JOBSET)


def test_pods_find_the_first_of_them_by_the_name_that_a_jobset_gives_it() -> None:
    manifest = jobset(Work(PRESETS["owt"], "/store", PODS))
    job, name = the_job(manifest)["spec"], manifest["metadata"]["name"]
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 4, 4)
    container = the_container(manifest)
    env = {entry["name"]: entry for entry in container["env"]}
    (replicated,) = manifest["spec"]["replicatedJobs"]
    pod = f"{name}-{replicated['name']}-0-0.{name}"  # JobSet, replicated job, its index, the pod's; subdomain: JobSet
    assert env["JAX_COORDINATOR_ADDRESS"]["value"] == f"{pod}:{container['ports'][0]['containerPort']}"
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
    assert pod["terminationGracePeriodSeconds"] == 300
    assert pod["securityContext"]["runAsNonRoot"]


# What is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target": "process", "nodes": 2}, "no use for nodes"),
        ({"target": "slurm", "image": "x"}, "no use for image"),
        ({"target": "k8s", "image": "x", "partition": "gpu"}, "no use for partition"),
        ({"target": "k8s"}, "needs an image"),
        ({"target": "slurm", "nodes": 0}, "nodes"),
        ({"target": "slurm", "partition": "gpu\n#SBATCH --wrap=id"}, "partition"),
        ({"target": "slurm", "time_limit": 10, "grace_seconds": 600}, "leaves little"),
        ({"target": "cloud"}, "target"),
        ({"nodez": 2}, "nodez"),
    ],
)
def test_a_launch_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Launch(**fields)


@pytest.mark.parametrize(
    ("launch", "store", "message"),
    [
        (BUCKET, "data/store", "name a volume that pods share"),
        (PODS, "data/store", "is mounted at /store"),
        (PODS, "s3://bucket/store", "several hosts save one checkpoint together"),
        (SLURM, "s3://bucket/store", "several hosts save one checkpoint together"),
        (SLURM, "memory://x", "in memory is seen by no other process"),
    ],
)
def test_a_store_that_the_hosts_would_not_share_is_refused(launch: Launch, store: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        follow.SCHEDULERS[launch.target].submit(Work(PRESETS["demo"], store, launch))


def test_text_that_pods_would_look_up_and_not_see_is_refused() -> None:
    with pytest.raises(UsageError, match="no pod sees the file"):
        jobset(Work(CONFIG, "s3://bucket/store", BUCKET))
    assert jobset(Work(CONFIG, "s3://bucket/store", BUCKET, inputs=INPUTS))


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--target", "k8s"], 2, "needs an image"),
        (["--target", "k8s", "--image", "x", "--dry-run"], 2, "no pod sees the folder"),
        (["--target", "process"], 2, "invalid choice"),
        (["--nodes", "0"], 2, "greater than or equal to 1"),
        ([], 1, "train needs tokenizer and shard"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(tmp_path: Path, flags: list[str], code: int, message: str) -> None:
    (tmp_path / "data" / "store").mkdir(parents=True)
    done = nanodlm("launch", "demo", *flags, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_a_dry_run_prints_the_job_and_nothing_else() -> None:
    flags = ["--train.lr", "0.002", "--store", "/store/runs", "--dry-run"]
    slurm = nanodlm("launch", "demo", "--target", "slurm", "--nodes", "2", *flags)
    assert (slurm.returncode, slurm.stderr) == (0, "")
    config = PRESETS["demo"].replace(train={"lr": 0.002})
    assert slurm.stdout == slurm_script(Work(config, "/store/runs", Launch(target="slurm", nodes=2)))
    pods = nanodlm("launch", "demo", "--target", "k8s", "--image", "a:1", "--store_volume", "shared", *flags)
    assert (pods.returncode, pods.stderr) == (0, "")
    launch = Launch(target="k8s", image="a:1", store_volume="shared")
    assert yaml.safe_load(pods.stdout) == jobset(Work(config, "/store/runs", launch))


def test_a_dry_run_names_the_inputs_that_a_store_at_hand_holds(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(CONFIG.model_dump_json())
    done = nanodlm("launch", str(tmp_path / "config.json"), "--store", str(prepared), "--dry-run")
    told = ready("train", CONFIG, Store(str(prepared))).input_fingerprints
    assert f"--inputs shard={told['shard']} tokenizer={told['tokenizer']}" in done.stdout


# What schedulers say


@pytest.mark.parametrize(("launch", "program"), [(SLURM, "sbatch"), (PODS, "kubectl")])
def test_a_scheduler_that_is_not_there_or_refuses_is_one_line(
    launch: Launch, program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    submit, work = follow.SCHEDULERS[launch.target].submit, Work(PRESETS["demo"], "/store/runs", launch)
    with pytest.raises(NanodlmError, match=f"there is no program {program} here"):
        submit(work)
    stand_in(tmp_path, program, "echo something else >&2; echo error: you may not >&2; exit 1")
    with pytest.raises(NanodlmError, match=f"^{program} did not take the job: error: you may not$"):
        submit(work)


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


FAILED = {"conditions": [{"type": "Failed", "status": "True", "message": "too many"}], "terminalState": "Failed"}


@pytest.mark.parametrize(
    ("status", "message"),
    [
        ({"terminalState": "Completed"}, "ended without a train artifact"),
        (FAILED, "did not finish: the loss is not a number; run again to continue"),
    ],
)
def test_a_jobset_that_ends_without_its_artifact_is_an_error_and_its_pods_are_kept_to_look_at(
    kubectl: Path, store: Store, status: dict[str, Any], message: str
) -> None:
    (kubectl / "status.json").write_text(json.dumps({"status": status}))
    with pytest.raises(NanodlmError, match=message):
        follow.run_on_cluster(ready("train", CONFIG, store), CONFIG, store, PODS)
    calls = (kubectl / "calls").read_text().splitlines()
    created = calls.index("create --filename=-")
    assert not [call for call in calls[created:] if call.startswith("delete")]
    manifest = json.loads((kubectl / "manifest.json").read_text())
    assert any(manifest["metadata"]["name"] in call and "--namespace research" in call for call in calls[created:])


def test_a_jobset_that_runs_is_found_again_and_one_that_has_ended_makes_room(kubectl: Path) -> None:
    calls = kubectl / "calls"

    def submitted(status: dict[str, Any]) -> tuple[bool, list[str]]:
        (kubectl / "status.json").write_text(json.dumps(status))
        calls.unlink(missing_ok=True)
        job = follow.SCHEDULERS["k8s"].submit(Work(CONFIG, f"{kubectl}/store", PODS, inputs=INPUTS))
        words = [call.split()[0] for call in calls.read_text().splitlines()]
        return job.found, [word for word in words if word != "logs"]

    assert submitted({}) == (False, ["get", "delete", "create"])
    assert submitted({"status": {"restarts": 1}}) == (True, ["get"])
    assert submitted({"status": FAILED}) == (False, ["get", "delete", "create"])
    assert submitted({"metadata": {"deletionTimestamp": "now"}}) == (False, ["get", "delete", "create"])


def test_a_slurm_that_does_not_answer_gets_no_second_job_and_one_that_is_ending_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("nanodlm.cluster.slurm.LOOK_SECONDS", 0.05)
    submit, work = follow.SCHEDULERS["slurm"].submit, Work(PRESETS["demo"], "/store", SLURM)
    stand_in(tmp_path, "sbatch", "echo 18")
    stand_in(tmp_path, "squeue", "echo error: Socket timed out >&2; exit 1")
    with pytest.raises(NanodlmError, match=r"^squeue does not say whether .*: error: Socket timed out$"):
        submit(work)
    ended = tmp_path / "ended"  # a second look finds it in the queue again, or gone
    for then, found in (("echo 17 PENDING", ("17", True)), ("true", ("18", False))):
        ended.unlink(missing_ok=True)
        stand_in(tmp_path, "squeue", f"[ -f {ended} ] && {{ {then}; exit; }}; touch {ended}; echo 17 COMPLETING")
        job = submit(work)
        assert (job.name, job.found) == found


def test_a_jobs_name_is_that_of_its_work() -> None:
    names = {
        Work(config, store, PODS, stage, rebuild=rebuild).name
        for config in (PRESETS["demo"], PRESETS["owt"])
        for store in ("/store/a", "/store/b")
        for rebuild in (False, True)
        for stage in ("train", "evaluate")
    }
    assert len(names) == 16
    same = {
        Work(PRESETS["demo"].replace(**other), "/store", launch).name
        for launch in (PODS, PODS.model_copy(update={"nodes": 2}))
        for other in ({}, {"eval": {"max_rows": 7}}, {"exp": {"save_every": 7}})
    }
    assert len(same) == 1  # the same artifact's


class Interrupted(BaseException):
    pass


def test_an_interrupted_wait_deletes_the_jobset(kubectl: Path, store: Store) -> None:
    (kubectl / "status.json").write_text("{}")
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
