"""Scripts and manifests of jobs by their schemas, and what is refused; `test_slurm` runs jobs."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from nanodlm.cluster import follow, settings, slurm
from nanodlm.cluster.kubernetes import jobset
from nanodlm.cluster.settings import Launch, Work
from nanodlm.cluster.slurm import job_text
from nanodlm.config import PRESETS, load_config
from nanodlm.errors import NanodlmError, UsageError
from nanodlm.stages.lookup import ready
from nanodlm.store import Store
from tests.cluster.conftest import BUCKET, CONFIG, GPUS, INPUTS, NASTY, PODS, SLURM, stand_in
from tests.support.commands import environment, nanodlm

# The Slurm script


def options(script: str) -> dict[str, str]:
    """What its #SBATCH lines say."""
    lines = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script, re.MULTILINE)
    assert len(lines) == script.count("#SBATCH")
    return dict(lines)


def test_a_script_asks_slurm_for_a_task_for_each_gpu_and_for_a_signal_before_the_end() -> None:
    asked = options(job_text(Work(CONFIG, "/shared/store", GPUS)))
    assert {k: v for k, v in asked.items() if k not in ("job-name", "output")} == {
        "nodes": "4", "ntasks-per-node": "8", "gpus-per-node": "8",
        "dependency": "singleton", "signal": "TERM@300", "open-mode": "append", "requeue": "",
    }  # fmt: skip
    alone = options(job_text(Work(CONFIG, "/shared/store", GPUS, stage="sample")))
    assert (alone["nodes"], alone["ntasks-per-node"]) == ("1", "1")


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (75, True)])
def test_a_script_hands_the_configuration_on_unchanged_and_requeues_only_what_a_signal_ended(
    tmp_path: Path, code: int, requeued: bool
) -> None:
    """srun and scontrol are replaced by what writes down how they are called."""
    stand_in(tmp_path, "srun", f'printf "%s\\0" "$@" > {tmp_path}/srun.said; exit {code}')
    stand_in(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/scontrol.said')
    script = job_text(Work(NASTY, f"{tmp_path}/a store", GPUS, inputs=INPUTS, rebuild=True))
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


# What is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target": "process", "nodes": 2}, "no use for nodes"),
        ({"target": "slurm", "image": "x"}, "no use for image"),
        ({"target": "k8s"}, "needs an image"),
    ],
)
def test_a_launch_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Launch(**fields)


@pytest.mark.parametrize(
    ("launch", "store", "message"),
    [
        (BUCKET, "/store/runs", "no pod sees the folder"),
        (PODS, "data/store", "no pod sees the folder"),
        (PODS, "s3://bucket/store", "several hosts save one checkpoint together"),
        (SLURM, "s3://bucket/store", "several hosts save one checkpoint together"),
        (SLURM, "memory://x", "in memory is seen by no other process"),
    ],
)
def test_a_store_that_the_hosts_would_not_share_is_refused(launch: Launch, store: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        follow.SCHEDULERS[launch.target].submit(Work(PRESETS["demo"], store, launch))


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--target", "k8s"], 2, "needs an image"),
        (["--target", "k8s", "--image", "x", "--dry-run"], 2, "no pod sees the folder"),
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
    flags = ["--train.lr", "0.002", "--model.dtype", "float32", "--store", "/store/runs", "--dry-run"]
    slurm = nanodlm("launch", "demo", "--target", "slurm", "--nodes", "2", *flags)
    assert (slurm.returncode, slurm.stderr) == (0, "")
    config = PRESETS["demo"].replace(train={"lr": 0.002}, model={"dtype": "float32"})
    assert slurm.stdout == job_text(Work(config, "/store/runs", Launch(target="slurm", nodes=2)))
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


@pytest.mark.parametrize(("launch", "program"), [(SLURM, "squeue"), (PODS, "kubectl")])
def test_a_scheduler_that_is_not_there_or_refuses_is_one_line(
    launch: Launch, program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    submit, work = follow.SCHEDULERS[launch.target].submit, Work(PRESETS["demo"], "/store/runs", launch)
    with pytest.raises(
        NanodlmError, match=rf"^{program} failed \(.*No such file.*\): run this where jobs are submitted"
    ):
        submit(work)
    stand_in(tmp_path, program, "echo something else >&2; echo error: you may not >&2; exit 1")
    with pytest.raises(NanodlmError, match=rf"^{program} failed \(error: you may not\)"):
        submit(work)


def test_a_slurm_that_does_not_answer_gets_no_second_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    submit, work = follow.SCHEDULERS["slurm"].submit, Work(PRESETS["demo"], "/store", SLURM)
    stand_in(tmp_path, "sbatch", "echo 18")
    stand_in(tmp_path, "squeue", "echo error: Socket timed out >&2; exit 1")
    with pytest.raises(NanodlmError, match=r"^squeue failed \(error: Socket timed out\)"):
        submit(work)
    for answer, found in (("echo 17", ("17", True)), ("true", ("18", False))):
        stand_in(tmp_path, "squeue", answer)
        job = submit(work)
        assert (job.name, job.found) == found


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        ("echo JobId=18 JobState=RUNNING", None),
        ("echo error: Socket timed out >&2; exit 1", None),
        ("echo JobId=18 JobState=COMPLETED", ""),
        ("echo JobId=18 JobState=CANCELLED", "it is CANCELLED"),
        ("echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", "it is gone from the queue"),
    ],
)
def test_how_a_job_has_ended_is_told_when_slurm_knows_it(
    answer: str, failure: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    stand_in(tmp_path, "scontrol", answer)
    assert slurm.ended("18") == failure
    assert settings.ask("sleep", "60", seconds=0.1)[0] == 127


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
