"""Several devices train as one does: virtual CPU devices, and numbers that must not change."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanodlm.errors import UsageError
from nanodlm.stages import run as stages_run
from nanodlm.store import Store
from tests.support.commands import environment, nanodlm, result_of
from tests.support.devices import CONFIG, ROOT, assert_same, attempt, command, manifest, on_devices, records

# Trainings on eight devices, in one process: what the configuration changes, and which are compared with which.
MESHES = {f"fsdp {f}, tensor {t}": {"train": {"fsdp": f, "tensor": t}} for f, t in ((1, 1), (2, 2), (8, 1), (1, 4))}
KINDS = {
    kind: {"objective": {"kind": kind, "block_size": 4}, "train": {"grad_acc_steps": 2, "fsdp": 2, "tensor": 2}}
    for kind in ("block", "autoregressive", "hybrid")
}
OTHERS = {
    "skips": {"train": {"skip_nonfinite": True, "lr": 1e30, "fsdp": 2, "tensor": 2}},
    "keeps": {"train": {"skip_nonfinite": True, "fsdp": 2}, "exp": {"keep": 1, "keep_best": 2}},
    "rows": {"train": {"batch_size": 3}},
    "heads": {"train": {"tensor": 8}},
}


def train_each(store: str, folder: str) -> None:
    """Train every configuration on the devices of this process, each in a copy of a store; note what is refused."""
    for name, groups in (MESHES | KINDS | OTHERS).items():
        copy = Path(folder, name, "store")
        shutil.copytree(store, copy)
        try:
            stages_run.run_stage("train", CONFIG.replace(**groups), Store(str(copy)))
        except UsageError as error:
            (copy / "refused").write_text(str(error))


@pytest.fixture(scope="module")
def eight(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what eight devices made of every configuration."""
    folder = tmp_path_factory.mktemp("eight")
    code = f"from tests.devices.test_mesh import train_each; train_each({str(prepared)!r}, {str(folder)!r})"
    argv, env = [sys.executable, "-c", code], environment(**on_devices(8))
    done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return folder


def test_two_devices_train_as_one_does(prepared: Path, alone: list[dict[str, Any]], tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "store")
    done = nanodlm(*command(tmp_path / "store", "--train.tensor", "2"), **on_devices(2))
    assert done.returncode == 0, done.stderr
    assert_same(records(attempt(tmp_path / "store")), alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_any_mesh_of_eight_devices_trains_as_one_device_does(
    eight: Path, alone: list[dict[str, Any]], name: str
) -> None:
    assert_same(records(attempt(eight / name / "store")), alone)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_other_objectives_and_accumulation_train_on_a_mesh_as_on_one_device(
    prepared: Path, eight: Path, tmp_path: Path, kind: str
) -> None:
    store = shutil.copytree(prepared, tmp_path / "store")
    config = CONFIG.replace(**{**KINDS[kind], "train": {"grad_acc_steps": 2}})
    stages_run.run_stage("train", config, Store(str(store)))
    assert_same(records(attempt(eight / kind / "store")), records(attempt(store)))


@pytest.mark.slow
def test_a_mesh_keeps_the_best_skips_and_starts_from_a_checkpoint_as_one_device_does(
    eight: Path, alone: list[dict[str, Any]]
) -> None:
    """Four other devices go on from the first checkpoint that the eight have kept."""
    store = eight / "keeps" / "store"
    first = attempt(store)
    scores = {r["step"]: r["val_nats_per_token"] for r in alone if "val_nats_per_token" in r}
    kept = {int(path.name[5:]) for path in (first / "checkpoints").iterdir()}
    assert kept == {max(scores), *sorted(scores, key=scores.__getitem__)[:2]}
    assert_same(records(first), alone)
    source = f"{first}/checkpoints/step_{min(kept)}"
    resume = ["--exp.resume_path", source, "--train.tensor", "2", "--train.skip_nonfinite", "True"]
    metrics = result_of(nanodlm(*command(store, *resume, "--json"), **on_devices(4)))["metrics"]
    assert (metrics["resumed_from_update"], metrics["skipped"]) == (min(kept), 0)
    folders = [Store(str(store)).open(f"train/{f}").local() for stage, f in Store(str(store)) if stage == "train"]
    (second,) = (folder for folder in folders if folder != first)
    assert_same(records(second), alone)


@pytest.mark.slow
def test_updates_that_are_not_finite_are_skipped_on_a_mesh(eight: Path) -> None:
    found = records(attempt(eight / "skips" / "store"))
    assert [r["step"] for r in found] == list(range(1, CONFIG.train.max_steps + 1))
    assert found[-1]["skipped"] > 2


@pytest.mark.slow
def test_what_eight_devices_cannot_share_is_refused(eight: Path) -> None:
    rows, heads = ((eight / name / "store" / "refused").read_text() for name in ("rows", "heads"))
    assert "3 rows cannot be shared by 8 devices" in rows
    assert "n_heads 4 cannot be shared by --train.tensor 8" in heads


def test_what_devices_cannot_cut_is_refused_in_one_line(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "store")
    flags = ["--train.tensor", "2", "--model.d_ff", "63"]
    done = nanodlm(*command(tmp_path / "store", *flags), **on_devices(2))
    assert done.returncode == 2
    assert "--train.tensor 2 cannot cut evenly" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.slow
def test_a_run_goes_on_on_other_numbers_of_devices_with_the_same_batches_and_losses(
    prepared: Path, alone: list[dict[str, Any]], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(prepared, store)
    parts = "train/*/attempts/*/parts/checkpoints/*.json"
    for devices, axis in ((8, "fsdp"), (4, "tensor"), (2, "fsdp")):
        argv = command(store, "--exp.save_every", "1", f"--train.{axis}", str(devices))
        running = subprocess.Popen([sys.executable, "-m", "nanodlm", *argv], env=environment(**on_devices(devices)))
        before = len(list(store.glob(parts)))
        while running.poll() is None and devices > 2:
            if len(list(store.glob(parts))) > before:
                running.send_signal(signal.SIGKILL)
            time.sleep(0.01)
        if running.wait(200) == 0:
            break
    assert running.returncode == 0
    assert manifest(store)["metrics"]["resumed_from_update"] >= 1
    np.testing.assert_allclose([r["loss"] for r in records(attempt(store))], [r["loss"] for r in alone], rtol=2e-4)
