"""Several devices and several processes: real processes, virtual CPU devices, and numbers that must not change."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanodlm.config import PRESETS, Config
from nanodlm.devices import hosts
from nanodlm.errors import UsageError
from nanodlm.stages import run as stages_run
from nanodlm.stages import table
from nanodlm.store import Store
from tests.support.commands import environment, nanodlm, result_of, speeches

CONFIG = PRESETS["demo"].replace(
    data={"source": speeches(6), "val_tokens": 5000, "tokenizer": "bytes"},
    model={"seq_len": 16, "n_layers": 2, "n_heads": 4, "d_model": 32, "d_ff": 64},
    train={"max_steps": 12, "warmup_steps": 2, "cooldown_steps": 4, "batch_size": 16, "ema_decay": 0.9},
    exp={"save_every": 4, "log_every": 1, "val_rows": 20},
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with data, and no trained model."""
    folder = tmp_path_factory.mktemp("prepared")
    for name in table.until("shard"):
        stages_run.run_stage(name, CONFIG, Store(str(folder)))
    return folder


@pytest.fixture(scope="module")
def alone(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Log records of a run on the one device of this process."""
    store = tmp_path_factory.mktemp("alone") / "store"
    shutil.copytree(prepared, store)
    stages_run.run_stage("train", CONFIG, Store(str(store)))
    return records(attempt(store))


def command(store: Path, *flags: str, config: Config = CONFIG) -> list[str]:
    file = store.parent / "config.json"
    file.write_text(config.model_dump_json())
    return ["train", str(file), "--store", str(store), *flags]


def on_devices(count: int) -> dict[str, str]:
    """NPROC keeps the devices' collectives from waiting for threads that are not there."""
    return {"NPROC": "16", "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}


def train(prepared: Path, store: Path, *flags: str, devices: int, config: Config = CONFIG) -> Path:
    """Train in a process of its own, on a copy of the prepared store: the artifact's attempt folder."""
    shutil.copytree(prepared, store)
    done = nanodlm(*command(store, *flags, config=config), **on_devices(devices))
    assert done.returncode == 0, done.stderr
    return attempt(store)


def attempt(store: Path) -> Path:
    """The folder of the one train artifact."""
    opened = Store(str(store))
    (fingerprint,) = (f for stage, f in opened if stage == "train")
    artifact = opened.find("train", fingerprint)
    assert artifact is not None
    assert not artifact.problems(deep=True)
    return artifact.local()


def manifest(store: Path) -> dict[str, Any]:
    """Of the one train artifact."""
    return json.loads(next(store.glob("train/*/manifest.json")).read_text())


def records(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "logs.json").read_text())


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """The same losses, gradients and validation bounds within rounding, which grows from update to update."""
    assert [r["step"] for r in found] == [r["step"] for r in expected]
    for name, tolerance in (("loss", 2e-4), ("nats_per_token", 2e-4), ("grad_norm", 5e-3)):
        np.testing.assert_allclose([r[name] for r in found], [r[name] for r in expected], rtol=tolerance)
    scores = [[r["val_nats_per_token"] for r in run if "val_nats_per_token" in r] for run in (found, expected)]
    assert len(scores[0]) == 3
    np.testing.assert_allclose(*scores, rtol=2e-4)


MESHES = [(8, 2, 2), (8, 1, 1), (8, 8, 1), (8, 1, 4), (4, 4, 1), (2, 1, 2)]


@pytest.mark.parametrize(
    ("devices", "fsdp", "tensor"),
    [mesh if mesh == (2, 1, 2) else pytest.param(*mesh, marks=pytest.mark.slow) for mesh in MESHES],
)
def test_any_mesh_trains_as_one_device_does(
    prepared: Path, alone: list[dict[str, Any]], tmp_path: Path, devices: int, fsdp: int, tensor: int
) -> None:
    flags = ["--train.fsdp", str(fsdp), "--train.tensor", str(tensor)]
    assert_same(records(train(prepared, tmp_path / "store", *flags, devices=devices)), alone)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["block", "autoregressive", "hybrid"])
def test_other_objectives_and_accumulation_train_on_a_mesh_as_on_one_device(
    prepared: Path, tmp_path: Path, kind: str
) -> None:
    config = CONFIG.replace(objective={"kind": kind, "block_size": 4}, train={"grad_acc_steps": 2})
    one = train(prepared, tmp_path / "one", devices=1, config=config)
    eight = train(prepared, tmp_path / "8", "--train.fsdp", "2", "--train.tensor", "2", devices=8, config=config)
    assert_same(records(eight), records(one))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_two(
    store: Path,
    *flags: str,
    devices: int = 2,
    slurm: bool = False,
    others: Sequence[str] = (),
    environ: dict[str, str] | None = None,
) -> list[subprocess.Popen[str]]:
    """Two processes that train together; `others` are flags that only the second one is given."""
    port, found = free_port(), []
    for process in range(2):
        env = environment(**on_devices(devices), **(environ or {}))
        words = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process", str(process)]
        if slurm:
            words = []
            env |= {
                "SLURM_JOB_ID": "7",
                "SLURM_STEP_NODELIST": "127.0.0.1",
                "SLURM_NTASKS": "2",
                "SLURM_PROCID": str(process),
                "SLURM_LOCALID": str(process),
                "JAX_COORDINATOR_PORT": str(port),
            }
        argv = [sys.executable, "-m", "nanodlm", *command(store, *flags, *words, *others[: process * 9])]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        found.append(subprocess.Popen(argv, env=env, text=True, start_new_session=True, **pipes))
    return found


def end(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit codes, and what was said on standard error."""
    try:
        return [(p.wait(200), p.communicate()[1]) for p in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()


@pytest.mark.slow
def test_a_mesh_keeps_the_best_skips_and_starts_from_a_checkpoint_as_one_device_does(
    prepared: Path, alone: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The eight devices' run keeps all it saves; four others go on from its first checkpoint."""
    store, flags = tmp_path / "store", ["--train.skip_nonfinite", "True", "--exp.keep", "1"]
    first = train(prepared, store, *flags, "--exp.keep_best", "2", "--train.fsdp", "2", devices=8)
    scores = {r["step"]: r["val_nats_per_token"] for r in alone if "val_nats_per_token" in r}
    kept = {int(path.name[5:]) for path in (first / "checkpoints").iterdir()}
    assert kept == {max(scores), *sorted(scores, key=scores.__getitem__)[:2]}
    assert_same(records(first), alone)
    source = f"{first}/checkpoints/step_{min(kept)}"
    resume = ["--exp.resume_path", source, "--train.tensor", "2"]
    done = nanodlm(*command(store, *flags, *resume, "--json"), **on_devices(4))
    metrics = result_of(done)["metrics"]
    assert (metrics["resumed_from_update"], metrics["skipped"]) == (min(kept), 0)
    folders = [Store(str(store)).open(f"train/{f}").local() for stage, f in Store(str(store)) if stage == "train"]
    (second,) = (folder for folder in folders if folder != first)
    assert_same(records(second), alone)


@pytest.mark.slow
def test_updates_that_are_not_finite_are_skipped_on_a_mesh(prepared: Path, tmp_path: Path) -> None:
    flags = ["--train.skip_nonfinite", "True", "--train.lr", "1e30", "--train.fsdp", "2", "--train.tensor", "2"]
    folder = train(prepared, tmp_path / "store", *flags, devices=8)
    assert [r["step"] for r in records(folder)] == list(range(1, 13))
    assert records(folder)[-1]["skipped"] > 5


@pytest.mark.slow
def test_two_processes_killed_while_they_save_end_with_the_bits_of_undisturbed_ones(
    prepared: Path, tmp_path: Path
) -> None:
    """The one that does not save is killed; the other notices that it is alone and ends."""
    undisturbed, store, flags = tmp_path / "1" / "store", tmp_path / "2" / "store", ["--train.fsdp", "4"]
    for folder in (undisturbed, store):
        shutil.copytree(prepared, folder)
    assert [code for code, _ in end(start_two(undisturbed, *flags))] == [0, 0]
    saving = "train/*/attempts/*/checkpoints/*.orbax-checkpoint-tmp*"
    processes = start_two(store, *flags, "--exp.save_every", "2")
    try:
        while not list(store.glob(saving)) and all(p.poll() is None for p in processes):
            time.sleep(0.0005)
        processes[1].kill()
    finally:
        ended = end(processes)
    assert ended[1][0] == -signal.SIGKILL
    assert ended[0][0] != 0, ended
    assert not list(store.glob("train/*/manifest.json"))
    assert [code for code, _ in end(start_two(store, *flags, "--exp.save_every", "2"))] == [0, 0]
    found = [manifest(folder)["metrics"] for folder in (undisturbed, store)]
    assert found[0]["parameters_sha256"] == found[1]["parameters_sha256"]


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_and_both_continue_to_what_one_device_gives(
    prepared: Path, alone: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Parameters are cut between the processes; then the run goes on. A slow disk's worth of saves keeps it busy."""
    store = tmp_path / "store"
    shutil.copytree(prepared, store)
    processes = start_two(store, "--train.fsdp", "4", "--exp.save_every", "1")
    parts = "train/*/attempts/*/parts/checkpoints/step_000001.json"
    try:
        for _ in range(3000):
            if list(store.glob(parts)) or any(p.poll() is not None for p in processes):
                break
            time.sleep(0.02)
        began = time.monotonic()
        processes[1].send_signal(signal.SIGTERM)
    finally:
        ended = end(processes)
    assert [code for code, _ in ended] == [75, 75], ended
    assert time.monotonic() - began < 30
    assert all("a checkpoint is saved" in said for _, said in ended)
    assert [code for code, _ in end(start_two(store, "--train.fsdp", "4"))] == [0, 0]
    np.testing.assert_allclose([r["loss"] for r in records(attempt(store))], [r["loss"] for r in alone], rtol=2e-4)


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_while_they_start_stops_both(prepared: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(prepared, store)
    processes = start_two(store, "--train.max_steps", "4000")
    try:
        for _ in range(1500):
            if list(store.glob("train/*/attempts/*/tokenizer")) or any(p.poll() is not None for p in processes):
                break
            time.sleep(0.05)
        processes[1].send_signal(signal.SIGTERM)
    finally:
        ended = end(processes)
    assert [code for code, _ in ended] == [75, 75], ended


@pytest.mark.slow
def test_processes_that_were_not_started_alike_are_refused_before_anything_is_trained(
    prepared: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(prepared, store)
    ended = end(start_two(store, others=["--train.lr", "5e-3"]))
    assert all(code != 0 for code, _ in ended), ended
    assert "train.lr: 0.008 -> 0.005" in ended[1][1] or "not started alike" in ended[0][1], ended
    assert not list(store.glob("train/*/manifest.json"))


@pytest.mark.slow
def test_an_error_of_the_first_process_alone_ends_the_others_too(prepared: Path, tmp_path: Path) -> None:
    """The trackers are the first one's business: here W&B does not start."""
    store = tmp_path / "store"
    shutil.copytree(prepared, store)
    began = time.monotonic()
    ended = end(start_two(store, "--exp.use_wandb", "True", environ={"WANDB_MODE": "nonsense"}))
    assert all(code != 0 for code, _ in ended), ended
    assert "W&B" in ended[0][1]
    assert time.monotonic() - began < 150


@pytest.mark.slow
def test_slurms_environment_is_enough_for_two_processes_to_find_each_other(
    prepared: Path, alone: list[dict[str, Any]], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(prepared, store)
    ended = end(start_two(store, "--train.tensor", "4", slurm=True))
    assert [code for code, _ in ended] == [0, 0], ended
    assert_same(records(attempt(store)), alone)


@pytest.mark.slow
def test_a_run_goes_on_on_other_numbers_of_devices_with_the_same_batches_and_losses(
    prepared: Path, alone: list[dict[str, Any]], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(prepared, store)
    for devices, flags in (
        (8, ["--train.fsdp", "8"]),
        (4, ["--train.tensor", "2"]),
        (1, []),
        (2, ["--train.fsdp", "2"]),
    ):
        argv = [sys.executable, "-m", "nanodlm", *command(store, "--exp.save_every", "3", *flags)]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        running = subprocess.Popen(argv, env=environment(**on_devices(devices)), text=True, **pipes)
        before = len(list(store.glob("train/*/attempts/*/parts/checkpoints/*.json")))
        while running.poll() is None and devices != 2:
            if len(list(store.glob("train/*/attempts/*/parts/checkpoints/*.json"))) > before:
                running.send_signal(signal.SIGKILL)
            time.sleep(0.01)
        running.communicate(timeout=200)
        if running.returncode == 0:
            break
    assert running.returncode == 0
    assert manifest(store)["metrics"]["resumed_from_update"] >= 3
    np.testing.assert_allclose([r["loss"] for r in records(attempt(store))], [r["loss"] for r in alone], rtol=2e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param(["--train.batch_size", "3"], "3 rows cannot be shared by 2 devices", marks=pytest.mark.slow),
        (["--train.tensor", "2", "--model.d_ff", "63"], "--train.tensor 2 cannot cut evenly"),
        pytest.param(
            ["--train.tensor", "2", "--model.n_heads", "1"],
            "n_heads 1 cannot be shared by --train.tensor 2",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_devices_cannot_share_is_refused_in_one_line(
    prepared: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    store = tmp_path / "store"
    shutil.copytree(prepared, store)
    done = nanodlm(*command(store, *flags), **on_devices(2))
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    ("arguments", "environ", "message"),
    [
        (("", 2, 0), {}, "need all of --coordinator HOST:PORT"),
        (("127.0.0.1:1", None, None), {}, "need all of"),
        (("", None, None), {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"}, "need all of"),
        (("127.0.0.1:1", 2, 2), {}, "numbered from 0"),
        (("127.0.0.1", 2, 0), {}, "give HOST:PORT"),
        (("", None, None), {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "two"}, "whole numbers"),
    ],
)
def test_processes_that_cannot_find_each_other_are_told_why(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[Any, ...], environ: dict[str, str], message: str
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        hosts.join(*arguments)
