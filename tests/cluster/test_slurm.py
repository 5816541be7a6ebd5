"""Trainings on a real Slurm cluster of two nodes."""

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

import numpy as np
import pytest

from nanodlm.cluster import follow
from nanodlm.cluster.settings import Launch, Work
from nanodlm.cluster.slurm import job_text
from nanodlm.config import Config
from nanodlm.errors import NanodlmError
from nanodlm.stages import run
from nanodlm.stages.lookup import ready
from nanodlm.store import Store
from tests.cluster.conftest import CONFIG, GPUS
from tests.cluster.test_jobs import options
from tests.support.commands import nanodlm, started
from tests.support.slurm import slurm

pytestmark = pytest.mark.slow
ONE_NODE = Launch(target="slurm", gpus_per_node=0)


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


def follow_training(config: Config, store: Path, emit: Callable[..., None] = lambda *_, **__: None) -> None:
    opened = Store(str(store))
    follow.run_on_cluster(ready("train", config, opened), config, opened, ONE_NODE, emit=emit)


def written(folder: Path, config: Config) -> str:
    (folder / "config.json").write_text(config.model_dump_json())
    return str(folder / "config.json")


def test_a_flow_trains_as_a_slurm_job_and_reports_it(two_nodes: Path, prefect_server: dict[str, str]) -> None:
    program = """
import sys
from nanodlm.flows.pipeline import train
from nanodlm.cluster.settings import Launch
from nanodlm.config import as_changes, load_config
settings = as_changes(load_config(sys.argv[1]))
for record in train(*settings, sys.argv[2], train_on=Launch(target="slurm", gpus_per_node=0)):
    print(record["stage"], record["status"])
"""
    words = [sys.executable, "-c", program, CONFIG.model_dump_json(), str(two_nodes)]
    done = subprocess.run(words, env={**os.environ, **prefect_server}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-3:-1] == ["shard cached", "train built"]
    assert re.search(r"job \d+ is submitted: squeue -j \d+", done.stderr)
    assert list(two_nodes.glob("train/*/manifest.json"))


@pytest.mark.timeout(900)
def test_a_job_that_gets_slurms_signal_saves_goes_back_into_the_queue_and_ends_with_the_same_losses(
    two_nodes: Path, prepared: Path, tmp_path: Path
) -> None:
    shutil.copytree(prepared, tmp_path / "alone")
    run.run_stage("train", CONFIG, Store(str(tmp_path / "alone")))
    file = written(tmp_path, CONFIG.replace(exp={"save_every": 1}))
    flags = ["--target", "slurm", "--nodes", "2", "--gpus_per_node", "0", "--store", str(two_nodes)]
    done = nanodlm("launch", file, *flags)
    assert done.returncode == 0, done.stderr
    job = done.stdout.split()[1]
    assert done.stdout.startswith(f"job {job} is submitted: squeue -j {job}\n")
    eventually(lambda: checkpoints(two_nodes))
    subprocess.run(["scancel", "--signal=TERM", job], check=True)  # as before the time limit: to its tasks
    eventually(lambda: "(BeginTime)" in queue())  # Slurm lets it wait for two minutes
    time.sleep(5)  # started within the second in which it was ended, it would be taken for one that is being ended
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)
    (manifest,) = eventually(lambda: list(two_nodes.glob("train/*/manifest.json")), 300)
    output = Path(f"nanodlm-train-{job}.out").read_text()
    assert "a checkpoint is saved: run again to continue" in output
    metrics = json.loads(manifest.read_text())["metrics"]
    assert metrics["resumed_from_update"] > 0
    assert metrics["devices"] == 2
    np.testing.assert_allclose(losses(two_nodes), losses(tmp_path / "alone"), rtol=2e-4)
    eventually(lambda: not queue())


def test_a_job_outlives_a_killed_wait_is_followed_by_others_and_cancelled_by_one_that_is_interrupted(
    two_nodes: Path, tmp_path: Path
) -> None:
    config = CONFIG.replace(exp={"save_every": 1}, train={"max_steps": 5000})
    flags = ["launch", written(tmp_path, config), "--gpus_per_node", "0", "--store", str(two_nodes), "--wait"]
    with started(*flags) as process:
        eventually(lambda: checkpoints(two_nodes) or process.poll() is not None)
        process.kill()
    (job,) = [line.split()[0] for line in queue().splitlines()]
    events: list[tuple[str, dict[str, Any]]] = []
    ended: list[str] = []

    def wait() -> None:
        try:
            follow_training(config, two_nodes, lambda kind, **fields: events.append((kind, fields)))
        except NanodlmError as error:
            ended.append(str(error))

    follower = threading.Thread(target=wait, daemon=True)
    follower.start()
    eventually(lambda: "progress" in dict(events))
    assert events[0] == ("message", {"text": f"job {job} is there already: squeue -j {job}"})
    with started(*flags) as process:
        for line in process.stdout or ():
            if f"job {job} is there already" in line:
                break
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "run again to continue" in said[1]
    follower.join(120)
    assert f"job {job} did not finish: it is CANCELLED" in ended[0]
    eventually(lambda: not queue())
    time.sleep(2)
    assert not queue()  # it has not gone back into the queue
    assert "a checkpoint is saved" in Path(f"nanodlm-train-{job}.out").read_text()


def test_a_job_that_fails_is_one_line_that_says_why(two_nodes: Path) -> None:
    config = CONFIG.replace(train={"lr": 1e30, "max_steps": 400})
    with pytest.raises(NanodlmError, match=r"job \d+ did not finish: it is FAILED \(.*(last good|no checkpoint)"):
        follow_training(config, two_nodes)


def test_slurm_itself_accepts_every_option_of_a_script(two_nodes: Path) -> None:
    """`--test-only` parses all of them; that for GPUs, which these nodes do not have, is in its help."""
    launch = Launch(target="slurm", nodes=2, gpus_per_node=0)
    script = job_text(Work(CONFIG, str(two_nodes), launch))
    done = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for wrong in ("#SBATCH --no-such-option=1", "#SBATCH --nodes=many"):
        bad = script.replace("#SBATCH --requeue", wrong)
        refused = subprocess.run(["sbatch", "--test-only"], input=bad, capture_output=True, text=True, check=False)
        assert refused.returncode
    help_ = subprocess.run(["sbatch", "--help"], capture_output=True, text=True, check=True).stdout
    assert options(job_text(Work(CONFIG, str(two_nodes), GPUS))).keys() - options(script).keys() == {"gpus-per-node"}
    assert "--gpus-per-node=" in help_
