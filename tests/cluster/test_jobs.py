"""Stages on other machines: scripts and manifests by their schemas, and trainings on a real Slurm cluster."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from nanodlm.cluster import follow, jobs, kubernetes, settings
from nanodlm.cluster.kubernetes import jobset
from nanodlm.cluster.settings import Launch
from nanodlm.cluster.slurm import slurm_script
from nanodlm.config import PRESETS, Config, load_config
from nanodlm.errors import NanodlmError, UsageError
from nanodlm.stages import lookup, run, table
from nanodlm.store import Store, hold_lease, lease_events
from tests.support import helpers
from tests.support.commands import environment, nanodlm, speeches, started
from tests.support.slurm import slurm

CONFIG = PRESETS["demo"].replace(
    data={"source": speeches(6), "val_tokens": 5000, "tokenizer": "bytes"},
    model={"seq_len": 16, "n_layers": 1, "n_heads": 2, "d_model": 32, "d_ff": 64},
    train={"max_steps": 30, "warmup_steps": 2, "cooldown_steps": 4, "batch_size": 8},
    exp={"save_every": 10, "val_rows": 8},
)
NASTY = PRESETS["demo"].replace(sample={"prompt": 'it\'s $(HOME) `id` $PATH \\ "é"\nCONFIG\n$$'})
SLURM = Launch(target="slurm", nodes=2, gpus_per_node=0)
GPUS = Launch(target="slurm", nodes=4, gpus_per_node=8, cpus_per_task=6, memory_gb=512, time_limit=600,
              partition="gpu,big", account="lab", grace_seconds=300)  # fmt: skip
PODS = Launch(target="k8s", nodes=4, gpus_per_node=8, cpus_per_task=96, memory_gb=512, image="registry.local/nanodlm:1",
              namespace="research", queue="gpus", store_volume="shared", secret="bucket", service_account="trainer",
              grace_seconds=300, restarts=5)  # fmt: skip
BUCKET = Launch(target="k8s", image="registry.local/nanodlm:1")
KUBERNETES = "1.30"  # in which podFailurePolicy and everything else that is used is stable or on by default


# The Slurm script


def options(script: str) -> dict[str, str]:
    """What its #SBATCH lines say."""
    lines = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script, re.MULTILINE)
    assert len(lines) == script.count("#SBATCH")
    return dict(lines)


def test_a_script_asks_slurm_for_a_task_for_each_gpu_and_for_a_signal_before_the_end() -> None:
    asked = options(slurm_script(CONFIG, "/shared/store", GPUS))
    assert {k: v for k, v in asked.items() if k not in ("job-name", "output")} == {
        "nodes": "4", "ntasks-per-node": "8", "gpus-per-node": "8", "cpus-per-task": "6", "mem": "512G", "time": "600",
        "partition": "gpu,big", "account": "lab", "signal": "TERM@300", "open-mode": "append", "requeue": "",
    }  # fmt: skip
    assert options(slurm_script(CONFIG, "/shared/store", GPUS, stage="sample"))["nodes"] == "1"
    assert options(slurm_script(CONFIG, "/shared/store", GPUS, stage="sample"))["ntasks-per-node"] == "1"


def stand_in(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (2, False), (75, True)])
def test_a_script_hands_the_configuration_on_unchanged_and_requeues_only_what_a_signal_ended(
    tmp_path: Path, code: int, requeued: bool
) -> None:
    """srun and scontrol are replaced by what writes down how they are called."""
    stand_in(tmp_path, "srun", f'printf "%s\\0" "$@" > {tmp_path}/srun.said; exit {code}')
    stand_in(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/scontrol.said')
    script = slurm_script(NASTY, f"{tmp_path}/a store", GPUS, rebuild=True)
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    env = environment(PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID="17")
    assert subprocess.run(["bash"], input=script, text=True, env=env, check=False).returncode == code
    words = (tmp_path / "srun.said").read_text().split("\0")[:-1]
    at = words.index("nanodlm")
    assert words[at + 1] == "train"
    assert load_config(words[at + 2]) == NASTY
    assert words[at + 3 :] == ["--store", f"{tmp_path}/a store", "--rebuild"]
    said = tmp_path / "scontrol.said"
    assert (said.read_text() == "requeue 17\n") if requeued else not said.exists()


@pytest.mark.parametrize("target", ["slurm", "k8s"])
def test_the_command_of_a_job_is_one_that_nanodlm_takes(target: str, tmp_path: Path) -> None:
    """A command line that it does not take would end with 2."""
    config = CONFIG.replace(data={"source": str(tmp_path / "missing.txt")})
    if target == "slurm":
        stand_in(tmp_path, "srun", f'printf "%s\\0" "$@" > {tmp_path}/srun.said')
        env = environment(PATH=f"{tmp_path}:{os.environ['PATH']}")
        script = slurm_script(config, str(tmp_path / "store"), GPUS, rebuild=True)
        subprocess.run(["bash"], input=script, text=True, env=env, check=True)
        words = (tmp_path / "srun.said").read_text().split("\0")[:-1]
    else:
        config = CONFIG.replace(data={"source": "http://127.0.0.1:9/missing.txt"})
        job = jobset(config, "/store", PODS, rebuild=True)["spec"]["replicatedJobs"][0]
        (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
        words = [*container["command"], *container["args"]]
    words = words[words.index("nanodlm") + 1 :]
    done = nanodlm(*words)
    assert (done.returncode, "missing.txt" in done.stderr) == (1, True), done.stderr


@pytest.mark.parametrize("make", [lambda c: slurm_script(c, "/shared", GPUS), lambda c: jobset(c, "/store", PODS)])
def test_settings_that_no_command_can_hold_are_refused(make: Callable[[Config], object]) -> None:
    sources = [f"s3://bucket/a-file-with-a-long-name-{n:06d}.txt" for n in range(3000)]
    with pytest.raises(UsageError, match=r"more than a job's command may hold: give --data.source as a glob"):
        make(CONFIG.replace(data={"source": sources}))


# The JobSet

JOBSET = {  # what jobset.x-k8s.io/v1alpha2 documents of the fields that are used, and no others
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {"type": "object"},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["replicatedJobs"],
            "properties": {
                "network": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "enableDNSHostnames": {"type": "boolean"},
                        "publishNotReadyAddresses": {"type": "boolean"},
                        "subdomain": {"type": "string", "format": "hostname"},
                    },
                },
                "suspend": {"type": "boolean"},
                "ttlSecondsAfterFinished": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
                "failurePolicy": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "maxRestarts": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
                        "restartStrategy": {"enum": ["Recreate", "BlockingRecreate"]},
                        "rules": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "additionalProperties": False,
                                "required": ["action"],
                                "properties": {
                                    "name": {"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                                    "action": {
                                        "enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
                                    },
                                    "onJobFailureReasons": {
                                        "type": "array",
                                        "items": {
                                            "enum": [
                                                "BackoffLimitExceeded",
                                                "DeadlineExceeded",
                                                "FailedIndexes",
                                                "MaxFailedIndexesExceeded",
                                                "PodFailurePolicy",
                                            ]
                                        },
                                    },
                                    "targetReplicatedJobs": {"type": "array", "items": {"type": "string"}},
                                },
                            },
                        },
                    },
                },
                "replicatedJobs": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["name", "template"],
                        "properties": {
                            "name": {"type": "string", "pattern": "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"},
                            "replicas": {"type": "integer", "minimum": 1},
                            "template": {"type": "object"},
                        },
                    },
                },
            },
        },
    },
}


def the_job(manifest: dict[str, Any]) -> dict[str, Any]:
    """The Job that the JobSet controller makes of its template."""
    (replicated,) = manifest["spec"]["replicatedJobs"]
    name = f"{manifest['metadata']['name']}-{replicated['name']}-0"
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, **replicated["template"]}


@pytest.mark.parametrize("stage", ["train", "evaluate", "sample"])
@pytest.mark.parametrize(("launch", "store"), [(PODS, "/store/runs"), (BUCKET, "s3://bucket/store")])
def test_a_jobset_and_the_job_and_pods_in_it_are_as_kubernetes_defines_them(
    launch: Launch, store: str, stage: str
) -> None:
    manifest = jobset(PRESETS["owt"], store, launch, rebuild=True, stage=stage)
    jsonschema.validate(manifest, JOBSET)
    kubernetes_validate.validate(the_job(manifest), KUBERNETES, strict=True)
    assert yaml.safe_load(yaml.safe_dump(manifest)) == manifest


def test_the_schemas_refuse_what_is_misspelt() -> None:
    manifest = jobset(PRESETS["owt"], "/store", PODS)
    job = the_job(manifest)
    job["spec"]["template"]["spec"]["terminationGracePeriod"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, KUBERNETES, strict=True)
    manifest["spec"]["failurePolicy"]["maxRestart"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, JOBSET)


def test_pods_find_the_first_of_them_by_the_name_that_a_jobset_gives_it() -> None:
    manifest = jobset(PRESETS["owt"], "/store", PODS)
    job, name = the_job(manifest)["spec"], manifest["metadata"]["name"]
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 4, 4)
    (container,) = job["template"]["spec"]["containers"]
    env = {entry["name"]: entry for entry in container["env"]}
    (replicated,) = manifest["spec"]["replicatedJobs"]
    pod = f"{name}-{replicated['name']}-0-0.{name}"  # JobSet, replicated job, its index, the pod's; subdomain: JobSet
    assert env["JAX_COORDINATOR_ADDRESS"]["value"] == f"{pod}:{container['ports'][0]['containerPort']}"
    assert env["JAX_NUM_PROCESSES"]["value"] == "4"
    assert "job-completion-index" in env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    alone = the_job(jobset(PRESETS["owt"], "s3://bucket/store", BUCKET))["spec"]["template"]["spec"]["containers"][0]
    assert not [entry for entry in alone["env"] if entry["name"].startswith("JAX_")]


def expanded(text: str) -> str:
    """What Kubernetes makes of an argument without defined variables: `$$` is one dollar."""
    return text.replace("$$", "$")


def test_a_jobset_holds_the_configuration_no_secret_and_the_graces_that_were_asked_for() -> None:
    manifest = jobset(NASTY, "/store", PODS)
    pod = the_job(manifest)["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert load_config(expanded(container["args"][0])) == NASTY
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
        (jobset if launch.target == "k8s" else slurm_script)(PRESETS["demo"], store, launch)


def test_text_that_pods_would_not_see_is_refused() -> None:
    with pytest.raises(UsageError, match="no pod sees the file"):
        jobset(CONFIG, "s3://bucket/store", BUCKET)


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


def test_a_dry_run_prints_the_job_and_nothing_else(tmp_path: Path) -> None:
    flags = ["--train.lr", "0.002", "--store", "/store/runs", "--dry-run"]
    slurm_ = nanodlm("launch", "demo", "--target", "slurm", "--nodes", "2", *flags)
    assert (slurm_.returncode, slurm_.stderr) == (0, "")
    config = PRESETS["demo"].replace(train={"lr": 0.002})
    assert slurm_.stdout == slurm_script(config, "/store/runs", Launch(target="slurm", nodes=2))
    pods = nanodlm("launch", "demo", "--target", "k8s", "--image", "a:1", "--store_volume", "shared", *flags)
    assert (pods.returncode, pods.stderr) == (0, "")
    launch = Launch(target="k8s", image="a:1", store_volume="shared")
    assert yaml.safe_load(pods.stdout) == jobset(config, "/store/runs", launch)


@pytest.mark.parametrize(("launch", "program"), [(SLURM, "sbatch"), (PODS, "kubectl")])
def test_a_scheduler_that_is_not_there_or_refuses_is_one_line(
    launch: Launch, program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    config, store = PRESETS["demo"], "/store/runs"
    with pytest.raises(NanodlmError, match=f"there is no program {program} here"):
        jobs.submit("train", config, store, launch)
    stand_in(tmp_path, program, "echo something else >&2; echo error: you may not >&2; exit 1")
    with pytest.raises(NanodlmError, match=f"^{program} did not take the job: error: you may not$"):
        jobs.submit("train", config, store, launch)


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
    for module in (settings, kubernetes):
        monkeypatch.setattr(module, "MOUNT", str(tmp_path))
    stand_in(tmp_path, "kubectl", KUBECTL.format(folder=tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with data, and no trained model."""
    folder = tmp_path_factory.mktemp("prepared")
    for name in table.until("shard"):
        run.run_stage(name, CONFIG, Store(str(folder)))
    return folder


FAILED = {"conditions": [{"type": "Failed", "status": "True", "message": "too many"}], "terminalState": "Failed"}


@pytest.mark.parametrize(
    ("status", "message"),
    [
        ({"terminalState": "Completed"}, "ended without a train artifact"),
        (FAILED, "did not finish: the loss is not a number; run again to continue"),
    ],
)
def test_a_jobset_that_ends_without_its_artifact_is_an_error_and_its_pods_are_kept_to_look_at(
    kubectl: Path, prepared: Path, status: dict[str, Any], message: str
) -> None:
    shutil.copytree(prepared, kubectl / "store")
    (kubectl / "status.json").write_text(json.dumps({"status": status}))
    config = CONFIG.model_copy()
    launch = PODS.model_copy(update={"nodes": 1})
    sources = [str(shutil.copy(path, kubectl)) for path in config.data.source]
    config = config.replace(data={"source": sources})
    with pytest.raises(NanodlmError, match=message):
        follow.run_on_cluster("train", config, f"{kubectl}/store", launch)
    calls = (kubectl / "calls").read_text().splitlines()
    created = calls.index("create --filename=-")
    assert not [call for call in calls[created:] if call.startswith("delete")]
    manifest = json.loads((kubectl / "manifest.json").read_text())
    assert any(manifest["metadata"]["name"] in call and "--namespace research" in call for call in calls[created:])


def test_a_jobset_that_runs_is_found_again_and_one_that_has_ended_makes_room(kubectl: Path) -> None:
    said = kubectl / "calls"

    def submitted(status: dict[str, Any]) -> tuple[bool, list[str]]:
        (kubectl / "status.json").write_text(json.dumps(status))
        said.unlink(missing_ok=True)
        job = jobs.submit("train", PRESETS["demo"], f"{kubectl}/store", PODS)
        words = [call.split()[0] for call in said.read_text().splitlines()]
        return job.found, [word for word in words if word != "logs"]

    assert submitted({}) == (False, ["get", "delete", "create"])
    assert submitted({"status": {"restarts": 1}}) == (True, ["get"])
    assert submitted({"status": FAILED}) == (False, ["get", "delete", "create"])
    assert submitted({"metadata": {"deletionTimestamp": "now"}}) == (False, ["get", "delete", "create"])


def test_a_slurm_that_does_not_answer_gets_no_second_job_and_one_that_is_ending_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(follow, "LOOK_SECONDS", 0.05)
    stand_in(tmp_path, "sbatch", "echo 18")
    stand_in(tmp_path, "squeue", "echo error: Socket timed out >&2; exit 1")
    with pytest.raises(NanodlmError, match=r"^squeue does not say whether .*: error: Socket timed out$"):
        jobs.submit("train", PRESETS["demo"], "/store", SLURM)
    ended = tmp_path / "ended"  # a second look finds it in the queue again, or gone
    for then, found in (("echo 17 PENDING", ("17", True)), ("true", ("18", False))):
        ended.unlink(missing_ok=True)
        stand_in(tmp_path, "squeue", f"[ -f {ended} ] && {{ {then}; exit; }}; touch {ended}; echo 17 COMPLETING")
        job = jobs.submit("train", PRESETS["demo"], "/store", SLURM)
        assert (job.name, job.found) == found


def test_a_jobs_name_is_that_of_its_work() -> None:
    names = {
        jobset(config, store, PODS, rebuild, stage=stage)["metadata"]["name"]
        for config in (PRESETS["demo"], PRESETS["owt"])
        for store in ("/store/a", "/store/b")
        for rebuild in (False, True)
        for stage in ("train", "evaluate")
    }
    assert len(names) == 16
    train, evaluate = (
        {
            jobset(PRESETS["demo"].replace(**other), "/store", launch, stage=stage)["metadata"]["name"]
            for launch in (PODS, PODS.model_copy(update={"nodes": 2}))
            for other in ({}, {"eval": {"max_rows": 7}}, {"exp": {"save_every": 7}})
        }
        for stage in ("train", "evaluate")
    )
    assert len(train) == 1  # of the same artifact
    assert len(evaluate) == 2


class Interrupted(BaseException):
    pass


def test_an_interrupted_wait_deletes_the_jobset(kubectl: Path, prepared: Path) -> None:
    shutil.copytree(prepared, kubectl / "store")
    (kubectl / "status.json").write_text("{}")
    sources = [str(shutil.copy(path, kubectl)) for path in CONFIG.data.source]
    config = CONFIG.replace(data={"source": sources})

    def emit(kind: str, **fields: Any) -> None:
        if kind == "progress":
            raise Interrupted

    store = Store(f"{kubectl}/store")
    fingerprint = lookup.ready("train", config, store)[0].fingerprint
    assert fingerprint
    with hold_lease(store, "train", fingerprint) as mine:
        mine["events"] = {"progress": {"done": 1, "total": 2, "unit": "updates"}}
        store.write_json(store.path("train", fingerprint, "lease.json"), mine)
        with pytest.raises(Interrupted):
            follow.run_on_cluster("train", config, store.uri(), PODS, emit=emit)
    name = jobset(config, store.uri(), PODS)["metadata"]["name"]
    assert (kubectl / "calls").read_text().splitlines()[-1].startswith(f"delete jobset {name} --namespace research")


# Progress in the store


def test_the_lease_tells_others_how_far_a_stage_is_and_the_artifact_knows_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanodlm.store.lease.LEASE_SECONDS", 0.3)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(helpers.prose(200)))
    store, told = Store(str(tmp_path / "store")), []
    config = helpers.tiny_config(text)

    def emit(kind: str, **fields: Any) -> None:
        (stage, fingerprint), began = next(iter(_leased(store))), time.monotonic()
        while lease_events(store, stage, fingerprint).get(kind) != fields and time.monotonic() < began + 5:
            time.sleep(0.02)
        told.append(lease_events(store, stage, fingerprint).get(kind) == fields)

    artifact, _ = run.run_stage("download", config, store, emit=emit)
    assert told
    assert all(told)
    assert lease_events(store, "download", artifact.fingerprint) == {}
    assert not artifact.problems(deep=True)


def _leased(store: Store) -> Iterator[tuple[str, str]]:
    for path in Path(store.root).glob("*/*/lease.json"):
        yield path.parts[-3], path.parts[-2]


# Slurm itself


@pytest.fixture(scope="module")
def cluster_env() -> Iterator[dict[str, str]]:
    with slurm() as environ:
        yield environ


@pytest.fixture
def two_nodes(cluster_env: dict[str, str], prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with data that a cluster of two nodes sees; the cluster's programs are those of this process."""
    for name, value in {**cluster_env, "NPROC": "16", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(follow, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(follow, "ASK_SECONDS", 1.0)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(prepared, tmp_path / "store")
    return tmp_path / "store"


def eventually(found: Callable[[], Any], seconds: float = 120.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < deadline, [path.read_text() for path in Path.cwd().glob("*.out")]
        time.sleep(0.05)
    return result


def checkpoints(store: Path) -> list[Path]:
    return list(store.glob("train/*/attempts/*/parts/checkpoints/*.json"))


def queue() -> str:
    return subprocess.run(["squeue", "--noheader"], capture_output=True, text=True, check=True).stdout


def losses(store: Path) -> list[float]:
    (fingerprint,) = (f for stage, f in Store(str(store)) if stage == "train")
    artifact = Store(str(store)).open(f"train/{fingerprint}").check(deep=True)
    return [record["loss"] for record in json.loads(artifact.file("logs.json").read_text())]


@pytest.fixture(scope="module")
def alone(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one device."""
    store = tmp_path_factory.mktemp("alone") / "store"
    shutil.copytree(prepared, store)
    run.run_stage("train", CONFIG, Store(str(store)))
    return losses(store)


@pytest.mark.slow
def test_two_slurm_nodes_train_what_one_process_does_and_tell_how_far_they_are(
    two_nodes: Path, alone: list[float]
) -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    follow.run_on_cluster(
        "train", CONFIG, str(two_nodes), SLURM, emit=lambda kind, **fields: events.append((kind, fields))
    )
    np.testing.assert_allclose(losses(two_nodes), alone, rtol=2e-4)
    assert json.loads(next(two_nodes.glob("train/*/manifest.json")).read_text())["metrics"]["devices"] == 2
    said = [fields["text"] for kind, fields in events if kind == "message"]
    assert re.fullmatch(r"slurm job \d+ is submitted: squeue -j \d+", said[0])
    eventually(lambda: not queue())
    follow.run_on_cluster("train", CONFIG, str(two_nodes), SLURM)  # finds it, and submits nothing
    assert not queue()


@pytest.mark.slow
def test_a_flow_trains_as_a_slurm_job_and_reports_it(two_nodes: Path, prefect_server: dict[str, str]) -> None:
    program = """
import sys
from flows.pipeline import train
from nanodlm.cluster.settings import Launch
from nanodlm.config import load_config
for record in train(load_config(sys.argv[1]), sys.argv[2], train_on=Launch(target="slurm", nodes=2, gpus_per_node=0)):
    print(record["stage"], record["status"])
"""
    words = [sys.executable, "-c", program, CONFIG.model_dump_json(), str(two_nodes)]
    done = subprocess.run(words, env={**os.environ, **prefect_server}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-3:-1] == ["shard cached", "train built"]
    assert "is submitted: squeue" in done.stderr
    assert json.loads(next(two_nodes.glob("train/*/manifest.json")).read_text())["metrics"]["devices"] == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_that_gets_slurms_signal_saves_goes_back_into_the_queue_and_ends_with_the_same_losses(
    two_nodes: Path, alone: list[float]
) -> None:
    config = CONFIG.replace(exp={"save_every": 1})
    file = two_nodes.parent / "config.json"
    file.write_text(config.model_dump_json())
    flags = ["--target", "slurm", "--nodes", "2", "--gpus_per_node", "0", "--store", str(two_nodes)]
    done = nanodlm("launch", str(file), *flags)
    assert done.returncode == 0, done.stderr
    job = done.stdout.split()[2]
    assert done.stdout.startswith(f"slurm job {job} is submitted: squeue -j {job}\n")
    eventually(lambda: checkpoints(two_nodes))
    subprocess.run(["scancel", "--signal=TERM", job], check=True)  # as before the time limit: to its tasks
    eventually(lambda: "(BeginTime)" in queue())  # Slurm lets it wait for two minutes
    time.sleep(5)  # started within the second in which it was ended, it would be taken for one that is being ended
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)
    (manifest,) = eventually(lambda: list(two_nodes.glob("train/*/manifest.json")), 300)
    output = Path(f"nanodlm-train-{job}.out").read_text()
    assert "a checkpoint is saved: run again to continue" in output
    assert json.loads(manifest.read_text())["metrics"]["resumed_from_update"] > 0
    np.testing.assert_allclose(losses(two_nodes), alone, rtol=2e-4)
    eventually(lambda: not queue())


@pytest.mark.slow
def test_an_interrupted_wait_cancels_the_job_which_saves_and_stays_cancelled(two_nodes: Path) -> None:
    file = two_nodes.parent / "config.json"
    config = CONFIG.replace(exp={"save_every": 1}, train={"max_steps": 3000})
    file.write_text(config.model_dump_json())
    flags = ["--nodes", "2", "--gpus_per_node", "0", "--store", str(two_nodes), "--wait"]
    with started("launch", str(file), *flags) as process:
        eventually(lambda: checkpoints(two_nodes) or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "run again to continue" in said[1]
    eventually(lambda: not queue())
    time.sleep(3)
    assert not queue()  # it has not gone back into the queue
    (output,) = two_nodes.parent.glob("*.out")
    assert "a checkpoint is saved" in output.read_text()


@pytest.mark.slow
def test_a_killed_wait_leaves_its_job_and_the_next_run_follows_that(two_nodes: Path) -> None:
    file, said = two_nodes.parent / "config.json", []
    config = CONFIG.replace(exp={"save_every": 1}, train={"max_steps": 200})
    file.write_text(config.model_dump_json())
    flags = ["--nodes", "2", "--gpus_per_node", "0", "--store", str(two_nodes), "--wait"]
    with started("launch", str(file), *flags) as process:
        eventually(lambda: checkpoints(two_nodes) or process.poll() is not None)
        process.kill()
    (job,) = [line.split()[0] for line in queue().splitlines()]

    def emit(kind: str, **fields: Any) -> None:
        said.append(fields.get("text"))
        assert len(queue().splitlines()) <= 1

    follow.run_on_cluster("train", config, str(two_nodes), SLURM, emit=emit)
    assert said[0] == f"slurm job {job} is there already: squeue -j {job}"
    assert len(list(two_nodes.glob("train/*/manifest.json"))) == 1
    eventually(lambda: not queue())


@pytest.mark.slow
def test_a_job_that_fails_or_is_cancelled_is_one_line_that_says_why(two_nodes: Path) -> None:
    config = CONFIG.replace(train={"lr": 1e30, "max_steps": 400})
    with pytest.raises(NanodlmError, match=r"slurm job \d+ did not finish: it is FAILED \(.*(last good|no checkpoint)"):
        follow.run_on_cluster("train", config, str(two_nodes), SLURM)
    ended: list[str] = []

    def wait() -> None:
        try:
            follow.run_on_cluster("train", CONFIG.replace(train={"max_steps": 5000}), str(two_nodes), SLURM)
        except NanodlmError as error:
            ended.append(str(error))

    waiting = threading.Thread(target=wait)
    waiting.start()
    job = eventually(lambda: queue().split())[0]
    subprocess.run(["scancel", job], check=True)
    waiting.join(120)
    assert f"slurm job {job} did not finish: it is CANCELLED" in ended[0]


@pytest.mark.slow
def test_a_cluster_ends_with_the_tests_that_started_it_even_when_they_are_killed() -> None:
    code = """
import time
from tests.support.slurm import slurm
with slurm() as environ:
    print(environ["SLURM_CONF"], flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as tests:
        assert tests.stdout
        folder = Path(tests.stdout.readline().strip()).parent
        assert len(processes(folder)) >= 4
        tests.kill()
    eventually(lambda: not processes(folder), 30)
    shutil.rmtree(folder)


def processes(folder: Path) -> list[str]:
    """Command lines that name a folder (Linux)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in found if str(folder) in line]


@pytest.mark.slow
def test_slurm_itself_accepts_every_option_of_a_script(two_nodes: Path) -> None:
    """`--test-only` parses all of them; that for GPUs, which these nodes do not have, is in its help."""
    launch = Launch(target="slurm", nodes=2, gpus_per_node=0, cpus_per_task=1, memory_gb=1, time_limit=60,
                    partition="all", account="lab")  # fmt: skip
    script = slurm_script(CONFIG, str(two_nodes), launch)
    done = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for wrong in ("#SBATCH --no-such-option=1", "#SBATCH --nodes=many"):
        bad = script.replace("#SBATCH --requeue", wrong)
        refused = subprocess.run(["sbatch", "--test-only"], input=bad, capture_output=True, text=True, check=False)
        assert refused.returncode
    help_ = subprocess.run(["sbatch", "--help"], capture_output=True, text=True, check=True).stdout
    assert options(slurm_script(CONFIG, str(two_nodes), GPUS)).keys() - options(script).keys() == {"gpus-per-node"}
    assert "--gpus-per-node=" in help_
