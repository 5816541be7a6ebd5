"""Several processes that train together: how they find each other, and how they end together."""

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

from nanodlm.devices import hosts
from nanodlm.errors import UsageError
from tests.support.commands import environment
from tests.support.devices import assert_same, attempt, command, manifest, on_devices, records

SAVING = "checkpoints/*.orbax-checkpoint-tmp*"  # in an attempt's folder, while one is written


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_two(
    store: Path, *flags: str, slurm: bool = False, others: Sequence[str] = (), environ: dict[str, str] | None = None
) -> list[subprocess.Popen[str]]:
    """Two processes of two devices that train together; `others` are flags that only the second one is given."""
    port, found = free_port(), []
    for process in range(2):
        env = environment(**on_devices(2), **(environ or {}))
        words = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process", str(process)]
        if slurm:
            words, number = [], str(process)
            env |= {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2"}
            env |= {"SLURM_PROCID": number, "SLURM_LOCALID": number, "JAX_COORDINATOR_PORT": str(port)}
        argv = [sys.executable, "-m", "nanodlm", *command(store, *flags, *words, *others[: process * 9])]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        found.append(subprocess.Popen(argv, env=env, text=True, start_new_session=True, **pipes))
    return found


def end(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit codes, and what stands on standard error."""
    try:
        return [(p.wait(200), p.communicate()[1]) for p in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()


def end_after(processes: list[subprocess.Popen[str]], store: Path, sign: str, number: int) -> list[tuple[int, str]]:
    """Send a signal to the second process as soon as files are in an attempt's folder, and wait for both."""
    try:
        while not list(store.glob(f"train/*/attempts/*/{sign}")) and all(p.poll() is None for p in processes):
            time.sleep(0.0005)
        processes[1].send_signal(number)
    finally:
        ended = end(processes)
    return ended


@pytest.fixture
def store(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the prepared store."""
    return shutil.copytree(prepared, tmp_path / "store")


@pytest.fixture(scope="module")
def together(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of two processes that found each other through Slurm's environment and were left alone."""
    store = shutil.copytree(prepared, tmp_path_factory.mktemp("together") / "store")
    ended = end(start_two(store, "--train.fsdp", "4", slurm=True))
    assert [code for code, _ in ended] == [0, 0], ended
    return store


@pytest.mark.slow
def test_slurms_environment_is_enough_for_two_processes_to_train_as_one_device_does(
    together: Path, alone: list[dict[str, Any]]
) -> None:
    assert_same(records(attempt(together)), alone)


@pytest.mark.slow
def test_two_processes_killed_while_they_save_end_with_the_bits_of_undisturbed_ones(
    together: Path, store: Path
) -> None:
    """The one that does not save is killed; the other notices that it is alone and ends."""
    flags = ["--train.fsdp", "4", "--exp.save_every", "1"]
    ended = end_after(start_two(store, *flags), store, SAVING, signal.SIGKILL)
    assert ended[1][0] == -signal.SIGKILL
    assert ended[0][0] != 0, ended
    assert not list(store.glob("train/*/manifest.json"))
    ended = end(start_two(store, *flags))
    assert [code for code, _ in ended] == [0, 0], ended
    found = [manifest(folder)["metrics"] for folder in (together, store)]
    assert found[0]["parameters_sha256"] == found[1]["parameters_sha256"]


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_and_both_continue_to_what_one_device_gives(
    store: Path, alone: list[dict[str, Any]]
) -> None:
    """Every row is shared by the devices of both processes; then the run goes on. Many saves keep it busy."""
    processes = start_two(store, "--train.tensor", "4", "--exp.save_every", "1")
    ended = end_after(processes, store, "checkpoints/step_000001*", signal.SIGTERM)
    assert [code for code, _ in ended] == [75, 75], ended
    assert all("a checkpoint is saved" in words for _, words in ended)
    ended = end(start_two(store, "--train.tensor", "4"))
    assert [code for code, _ in ended] == [0, 0], ended
    np.testing.assert_allclose([r["loss"] for r in records(attempt(store))], [r["loss"] for r in alone], rtol=2e-4)


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_while_they_start_stops_both(store: Path) -> None:
    ended = end_after(start_two(store, "--train.max_steps", "4000"), store, "tokenizer", signal.SIGTERM)
    assert [code for code, _ in ended] == [75, 75], ended


@pytest.mark.slow
def test_processes_that_were_not_started_alike_are_refused_before_anything_is_trained(store: Path) -> None:
    ended = end(start_two(store, others=["--train.lr", "5e-3"]))
    assert all(code != 0 for code, _ in ended), ended
    assert "train.lr: 0.008 -> 0.005" in ended[1][1] or "not started alike" in ended[0][1], ended
    assert not list(store.glob("train/*/manifest.json"))


@pytest.mark.slow
def test_an_error_of_the_first_process_alone_ends_the_others_too(store: Path) -> None:
    """The trackers are the first one's business: here W&B does not start."""
    began = time.monotonic()
    ended = end(start_two(store, "--exp.use_wandb", "True", environ={"WANDB_MODE": "nonsense"}))
    assert all(code != 0 for code, _ in ended), ended
    assert "W&B" in ended[0][1]
    assert time.monotonic() - began < 150


@pytest.mark.parametrize(
    ("arguments", "environ", "message"),
    [
        (("", 2, 0), {}, "need all of --coordinator HOST:PORT"),
        (("", None, None), {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"}, "need all of"),
        (("127.0.0.1:1", 2, 2), {}, "from 0 to N - 1.*found 127.0.0.1:1, 2 processes and process 2"),
        (("127.0.0.1", 2, 0), {}, "HOST:PORT.*found 127.0.0.1,"),
    ],
)
def test_processes_that_cannot_find_each_other_are_told_why(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[Any, ...], environ: dict[str, str], message: str
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        hosts.join(*arguments)
