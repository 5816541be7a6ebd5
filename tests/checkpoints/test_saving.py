"""Saving checkpoints: which stay, what is not worth saving, and processes that are really killed."""

import json
import random
import re
import signal
import threading
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nanodlm
from nanodlm.checkpoints.finding import find_checkpoint
from nanodlm.checkpoints.identity import describe_run
from nanodlm.checkpoints.saving import QUEUE, Checkpoints
from nanodlm.config import training_settings
from nanodlm.errors import NanodlmError, Stopped, Unreachable
from nanodlm.store import Artifact, Attempt, Store, new_attempt
from tests.support import commands
from tests.support.checkpoints import EVERY, cut, words_for
from tests.support.commands import started
from tests.support.training import tiny


def fake_state(step: int) -> dict[str, Any]:
    return {"model_state": {"w": jnp.full(3, step)}, "optimizer_state": {"m": jnp.zeros(3)}, "step": jnp.int32(step)}


def fake_run(attempt: Attempt, scores: dict[int, float | None], **kept: int) -> None:
    with Checkpoints(attempt, describe_run(tiny(), "data", "tokens", jax.random.key(0)), **kept) as checkpoints:
        checkpoints.restore(jax.eval_shape(partial(fake_state, 0)))
        for step, score in scores.items():
            checkpoints.save(fake_state(step), step, **({} if score is None else {"val_nats_per_token": score}))


def present(attempt: Attempt) -> list[int]:
    return sorted(int(p.name[5:]) for p in attempt.path.glob("checkpoints/*"))


def test_the_latest_and_the_best_are_kept_also_by_a_run_that_continues(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with new_attempt(store, "train", "f") as attempt:
        fake_run(attempt, {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 5: None, 6: 4.0}, keep=2, keep_best=2)
        assert present(attempt) == [2, 3, 5, 6]
    with new_attempt(store, "train", "f") as attempt:
        fake_run(attempt, {7: 5.0, 8: 1.5}, keep=2, keep_best=2)
        assert present(attempt) == [2, 7, 8]
    with new_attempt(store, "train", "f") as attempt:
        fake_run(attempt, {9: 9.0}, keep=1, keep_best=0)
        assert present(attempt) == [9]


class Away(Attempt):
    """An attempt whose store does not answer, until it is let; and which then may refuse."""

    def __init__(self, store: Store):
        super().__init__(store, "train", "f")
        self.back, self.error = threading.Event(), None

    def finish(self, name: str, files: Iterable[str], **info: Any) -> None:
        assert self.back.wait(60)
        if self.error:
            raise self.error
        super().finish(name, files, **info)


def test_saving_goes_on_while_the_store_does_not_answer_until_the_queue_is_full(tmp_path: Path) -> None:
    attempt, saved = Away(Store(str(tmp_path))), []
    with Checkpoints(attempt, {"config": {}}, keep=9) as checkpoints:

        def save() -> None:
            for step in range(1, QUEUE + 2):
                checkpoints.save(fake_state(step), step)
                saved.append(step)

        saving = threading.Thread(target=save)
        saving.start()
        saving.join(5)
        assert saving.is_alive()
        assert saved == list(range(1, QUEUE + 1))
        attempt.back.set()
        saving.join(60)
    recorded = sorted(path.stem for path in (attempt.path / "parts" / "checkpoints").iterdir())
    assert recorded == [f"step_{step:06d}" for step in range(1, QUEUE + 2)]


def test_a_save_that_could_not_be_published_ends_the_run(tmp_path: Path) -> None:
    attempt = Away(Store(str(tmp_path)))
    attempt.back.set()
    attempt.error = Unreachable("the bucket does not answer")
    with pytest.raises(Unreachable), Checkpoints(attempt, {"config": {}}, keep=9) as checkpoints:
        for step in range(1, QUEUE + 2):
            checkpoints.save(fake_state(step), step)
            time.sleep(0.2)
        raise AssertionError("nothing was said before the last save")
    with pytest.raises(Unreachable), Checkpoints(attempt, {"config": {}}, keep=9) as checkpoints:
        checkpoints.save(fake_state(99), 99)  # the last one: its failure is seen at the end


def test_scoring_checkpoints_leaves_the_bits_alone_and_is_recorded(trained: Artifact, data: Path) -> None:
    run = nanodlm.train(tiny(exp={**EVERY, "val_rows": 6, "log_every": 4}), str(data))
    assert run.metrics["parameters_sha256"] == trained.metrics["parameters_sha256"]
    infos = {step: find_checkpoint(f"{run.uri}/step_{step}").info for step in (4, 8, 12)}
    scores = {step: info["val_nats_per_token"] for step, info in infos.items()}
    assert all(0 < score < 10 for score in scores.values())
    assert run.metrics["best_update"] == min(scores, key=lambda step: scores[step])
    logs = json.loads((run.local() / "logs.json").read_text())
    assert {record["step"]: record["val_nats_per_token"] for record in logs} == scores


def test_a_loss_that_is_not_a_number_stops_the_run_before_it_is_saved(store: Store, fourth: str) -> None:
    train = {"lr": 1e30, "clip_grad_norm": 1.0}
    exp = {"resume_path": fourth, "allow_changed": ["train.lr"], "log_every": 100, "save_every": 1}
    with pytest.raises(NanodlmError, match="not a number at update") as caught:
        nanodlm.train(tiny(train=train, exp=exp), store.uri())
    found = re.search(r"at update (\d+) .*the last good checkpoint is (\S+/step_\d+): ", str(caught.value))
    assert found, caught.value
    assert found[2].endswith(f"step_{int(found[1]) - 1:06d}")
    assert find_checkpoint(found[2]).local().is_dir()
    assert not Path(found[2]).with_name(f"step_{int(found[1]):06d}").exists()
    model, _ = nanodlm.load(found[2])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(nnx.state(model)))


def test_a_run_that_has_saved_nothing_says_so(trained: Artifact, store: Store) -> None:
    with pytest.raises(NanodlmError, match=r"not a number at update .*no checkpoint was saved before"):
        nanodlm.train(tiny(train={"lr": 1e30, "clip_grad_norm": 0.0}, exp={"log_every": 1}), store.uri())


@pytest.mark.slow
def test_skipped_updates_are_counted_across_a_resumed_run(tmp_path: Path) -> None:
    train = {"lr": 1e30, "skip_nonfinite": True}
    whole = nanodlm.train(tiny(train=train), str(tmp_path / "whole"))
    assert whole.metrics["skipped"] > 5
    assert None in [record["grad_norm"] for record in json.loads((whole.local() / "logs.json").read_text())]
    store = Store(str(tmp_path / "cut"))
    cut(tiny(train=train), store, after=9)
    resumed = nanodlm.train(tiny(train=train), store.uri())
    assert resumed.metrics["resumed_from_update"] == 5
    for name in ("skipped", "parameters_sha256"):
        assert resumed.metrics[name] == whole.metrics[name]


def test_the_switch_that_skips_leaves_fingerprints_alone_while_it_is_off(trained: Artifact) -> None:
    assert "skip_nonfinite" not in trained.manifest["parameters"]["train"]
    assert training_settings(tiny(train={"skip_nonfinite": True}))["train"]["skip_nonfinite"] is True


def test_a_run_killed_while_it_saves_ends_with_the_bits_of_an_undisturbed_one(trained: Artifact, data: Path) -> None:
    config, attempts = tiny(exp={"save_every": 1, "log_every": 3, "val_rows": 0}), 0
    while not list(data.glob("train/*/attempts/*/checkpoints/*.orbax-checkpoint-tmp*")):
        attempts += 1
        assert attempts < 5, "no kill came in the middle of a save"
        with started("train", *words_for(config, data)) as process:
            while not list(data.glob("train/*/attempts/*/checkpoints/*.orbax-checkpoint-tmp*")):
                assert process.poll() is None, process.communicate()
                time.sleep(0.0005)
            process.send_signal(signal.SIGKILL)
            process.wait()
    run = nanodlm.train(config, str(data))
    assert run.metrics["parameters_sha256"] == trained.metrics["parameters_sha256"]
    assert not [file for file in run.manifest["files"] if "orbax-checkpoint-tmp" in file["path"]]


@pytest.mark.slow
def test_a_program_compiled_once_is_taken_from_the_cache_by_the_next_process(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other seeds and another schedule as well, of which the rates alone are compiled anew."""
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.delenv(name)
    train, kept = {"max_steps": 3, "optimizer": "muon"}, []
    other = {"seed": 5, "lr": 1e-3, "muon_lr": 5e-3, "max_steps": 4, "lr_schedule": "none"}
    for config in (tiny(train=train), tiny(train=train | other, model={"init_seed": 5})):
        done = commands.nanodlm("train", *words_for(config, data), NANODLM_CACHE=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stderr
        kept.append({path.name for path in (tmp_path / "cache" / "compiled").iterdir()})
    assert {"jit_update", "jit_initialise"} < {name.split("-")[0] for name in kept[0]}
    assert {name.split("-")[0] for name in kept[1] - kept[0]} <= {"jit__lambda"}


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_75_within_seconds(trained: Artifact, data: Path) -> None:
    config = tiny(train={"max_steps": 4000}, exp={"save_every": 100_000, "log_every": 1})
    events = data / "events.jsonl"
    with started("train", *words_for(config, data), "--events", str(events)) as process:
        while not events.exists() or '"progress"' not in events.read_text():
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == Stopped.exit_code, said
    assert time.monotonic() - began < 15
    found = re.search(r"stopped by a signal after update (\d+); a checkpoint is saved: run again to continue", said)
    assert found, said
    checkpoints = list(data.glob("train/*/attempts/*/checkpoints/*"))
    assert [path.name for path in checkpoints] == [f"step_{int(found[1]):06d}"]
    cut(config, Store(str(data)), after=int(found[1]) + 3)  # it goes on from there


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_bits_of_an_undisturbed_one(trained: Artifact, data: Path) -> None:
    config = tiny(train={"max_steps": 300}, exp={"save_every": 3, "log_every": 10, "val_rows": 8, "keep_best": 2})
    expected = nanodlm.train(config, trained.store.uri())
    moments, reached = random.Random(0), []
    for _ in range(4):
        # Either soon after the program has begun, or soon after it has saved.
        sign, patience = moments.choice([("attempts/*", 4.0), ("attempts/*/parts/checkpoints/*.json", 0.3)])
        before = set(data.glob(f"train/*/{sign}"))
        with started("train", *words_for(config, data)) as process:
            while process.poll() is None and set(data.glob(f"train/*/{sign}")) <= before:
                time.sleep(0.001)
            time.sleep(moments.uniform(0, patience))
            process.send_signal(signal.SIGKILL)
            process.wait()
        saved = data.glob("train/*/attempts/*/parts/checkpoints/*.json")
        reached.append(max((int(path.stem[5:]) for path in saved), default=0))
    assert 0 < reached[-1] < 300, reached
    assert reached == sorted(reached)
    run = nanodlm.train(config, str(data))
    assert run.metrics["resumed_from_update"] == reached[-1]
    assert run.metrics["parameters_sha256"] == expected.metrics["parameters_sha256"]
    assert run.metrics["best_update"] == expected.metrics["best_update"]
