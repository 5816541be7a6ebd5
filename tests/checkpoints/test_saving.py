"""Resuming: what is saved, what is kept, what is refused, and processes that are really killed."""

import json
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nanodlm
from nanodlm.checkpoints.finding import find_checkpoint
from nanodlm.checkpoints.identity import check_run, describe_run
from nanodlm.checkpoints.loading import parameters_sha256
from nanodlm.checkpoints.saving import QUEUE, Checkpoints
from nanodlm.cli import main
from nanodlm.config import Config
from nanodlm.diffusion.corruption import Corruption
from nanodlm.diffusion.objective import Objective
from nanodlm.diffusion.schedules import make_schedule
from nanodlm.errors import Damaged, NanodlmError, Stopped, Unreachable, UsageError
from nanodlm.model.transformer import Transformer
from nanodlm.stages import lookup
from nanodlm.store import Artifact, Attempt, Store, new_attempt
from nanodlm.training.logger import _Logger
from nanodlm.training.optimizer import make_optimizer
from nanodlm.training.step import init_state, train_step
from tests.support import commands
from tests.support.commands import started
from tests.training.test_loop import tiny

EVERY = {"save_every": 4, "keep": 3, "keep_best": 0}  # checkpoints after updates 4, 8 and 12


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def trained(store: Store) -> Artifact:
    return nanodlm.train(tiny(exp=EVERY), store.uri())


@pytest.fixture
def fourth(trained: Artifact) -> str:
    """Address of the checkpoint after update 4."""
    return f"{trained.uri}/step_4"


@pytest.fixture
def data(trained: Artifact, tmp_path: Path) -> Path:
    """A store that holds the data of the tiny configuration and nothing else."""
    for stage in ("download", "tokenizer", "split", "shard"):
        if (Path(trained.store.root) / stage).exists():
            shutil.copytree(Path(trained.store.root) / stage, tmp_path / "store" / stage)
    return tmp_path / "store"


class Cut(Exception):
    """Stands for a kill."""


def cut(config: Config, store: Store, after: int) -> None:
    """Train until the record of an update, and no further."""

    def emit(kind: str, **fields: Any) -> None:
        if kind == "progress" and fields["unit"] == "updates" and fields["done"] == after:
            raise Cut

    with pytest.raises(Cut):
        nanodlm.train(config, store.uri(), emit)


def steps(artifact: Artifact) -> list[int]:
    """Updates of the checkpoints in a run's folder."""
    return sorted(int(p.name[5:]) for p in (artifact.local() / "checkpoints").iterdir())


def refusal(store: Store, **groups: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as caught:
        nanodlm.train(tiny(**groups), store.uri())
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Continuing the same run


def test_an_interrupted_run_continues_from_its_last_checkpoint_to_the_same_bits(trained: Artifact, data: Path) -> None:
    store, config = Store(str(data)), tiny()
    cut(config, store, after=12)
    assert store.find("train", lookup.ready("train", config, store).fingerprint) is None
    resumed = nanodlm.train(config, store.uri())
    assert resumed.metrics["resumed_from_update"] == 10
    assert resumed.metrics["parameters_sha256"] == trained.metrics["parameters_sha256"]
    logs = json.loads((resumed.local() / "logs.json").read_text())
    assert [record["step"] for record in logs] == [3, 6, 9, 12]
    assert resumed.digest == trained.digest


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(trained: Artifact, data: Path) -> None:
    store, config = Store(str(data)), tiny(exp=EVERY)
    run = nanodlm.train(config, store.uri())
    for file in (run.local() / "checkpoints" / "step_000012").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    store.retire(("train", run.fingerprint))
    again = nanodlm.train(config, store.uri())
    assert again.metrics["resumed_from_update"] == 8
    assert again.metrics["parameters_sha256"] == trained.metrics["parameters_sha256"]


def test_resume_false_starts_an_interrupted_run_anew(trained: Artifact, data: Path) -> None:
    store = Store(str(data))
    cut(tiny(), store, after=9)
    run = nanodlm.train(tiny(exp={"resume": False}), store.uri())
    assert run.metrics["resumed_from_update"] == 0
    assert run.metrics["parameters_sha256"] == trained.metrics["parameters_sha256"]


def test_a_checkpoint_remembers_its_run(trained: Artifact, fourth: str) -> None:
    info = find_checkpoint(fourth).info
    assert info["config"]["train"]["batch_size"] == 4
    assert info["corpus"]["val_tokens"] == 5000
    assert info["dataset"] == trained.manifest["inputs"]["shard"]["digest"]
    assert info["tokenizer"] == trained.manifest["inputs"]["tokenizer"]["digest"]
    assert info["key"]["data"] == jax.random.key_data(jax.random.key(123)).tolist()
    assert info["rows_seen"] == 16
    assert [record["step"] for record in info["logs"]] == [3]


# Starting from a checkpoint


def test_a_run_started_from_a_checkpoint_ends_with_the_bits_of_the_run_that_made_it(
    trained: Artifact, store: Store, fourth: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = nanodlm.train(tiny(exp={"resume_path": fourth}), store.uri())
    assert run.metrics["resumed_from_update"] == 4
    assert run.metrics["parameters_sha256"] == trained.metrics["parameters_sha256"]
    assert run.fingerprint != trained.fingerprint
    assert run.digest == trained.digest
    assert steps(run) == [10, 12]
    # Whatever the address, it is the same checkpoint, and so the same artifact.
    folder = trained.local()
    monkeypatch.chdir(folder)
    for address in (f"{folder}/checkpoints/step_000004/", "checkpoints/step_4", f"{trained.uri}/checkpoints/step_0004"):
        assert nanodlm.train(tiny(exp={"resume_path": address}), store.uri()).manifest == run.manifest


@pytest.mark.slow
def test_an_interrupted_run_that_was_started_from_a_checkpoint_continues_from_its_own(
    trained: Artifact, store: Store, fourth: str
) -> None:
    config = tiny(train={"max_steps": 11}, exp={"resume_path": fourth, "allow_changed": ["train.max_steps"]})
    cut(config, store, after=11)
    run = nanodlm.train(config, store.uri())
    assert run.metrics["resumed_from_update"] == 10


def test_a_checkpoint_of_another_run_is_refused_field_by_field(store: Store, fourth: str) -> None:
    said = refusal(
        store,
        train={"lr": 1e-3, "batch_size": 2, "max_steps": 20},
        data={"shuffle_seed": 1},
        objective={"weighting": "bound"},
        exp={"resume_path": fourth},
    )
    for words in (
        "data.shuffle_seed: 123 -> 1;",
        "objective.weighting: uniform -> bound;",
        "train.batch_size: 4 -> 2;",
        "train.lr: 0.008 -> 0.001;",
        "train.max_steps: 12 -> 20)",
    ):
        assert words in said
    names = "data.shuffle_seed objective.weighting train.batch_size train.lr train.max_steps"
    assert said.endswith(f"add --exp.allow_changed {names}")
    # Allowing some is not enough, and what to say is said in full.
    exp = {"resume_path": fourth, "allow_changed": ["train.max_steps"]}
    said = refusal(store, train={"lr": 1e-3, "max_steps": 20}, exp=exp)
    assert said.endswith("add --exp.allow_changed train.lr train.max_steps")


def test_other_data_are_refused_with_the_settings_that_made_them(store: Store, fourth: str) -> None:
    said = refusal(store, data={"val_tokens": 6000}, exp={"resume_path": fourth})
    assert re.search(r"\(dataset: \w{12}… -> \w{12}… \(data\.val_tokens: 5000 -> 6000\)\)", said), said
    assert said.endswith("add --exp.allow_changed dataset")


def test_another_network_is_refused_whatever_is_allowed(store: Store, fourth: str) -> None:
    exp = {"resume_path": fourth, "allow_changed": ["train.lr"]}
    said = refusal(store, model={"d_ff": 64}, train={"lr": 1e-3}, exp=exp)
    assert "model.d_ff: 32 -> 64; train.lr: 0.008 -> 0.001" in said
    assert "model.d_ff cannot change in mid-training" in said
    exp = {"resume_path": fourth, "allow_changed": ["train.clip_grad_norm"]}
    said = refusal(store, train={"clip_grad_norm": 0.0}, exp=exp)
    assert "do not fit this configuration" in said


def test_what_is_allowed_by_name_may_change_and_no_row_is_skipped_or_seen_twice(store: Store, fourth: str) -> None:
    names = ["train.batch_size", "train.ema_decay", "train.max_steps", "train.skip_nonfinite"]
    changes = {"batch_size": 2, "ema_decay": 0.5, "max_steps": 8, "skip_nonfinite": True}
    run = nanodlm.train(tiny(train=changes, exp={"resume_path": fourth, "allow_changed": names}), store.uri())
    assert run.metrics["resumed_from_update"] == 4
    assert run.metrics["trained_tokens"] == (4 * 4 + 4 * 2) * 32
    assert run.metrics["skipped"] == 0
    assert find_checkpoint(f"{run.uri}/step_8").info["rows_seen"] == 24
    model, _ = nanodlm.load(run.uri)
    assert parameters_sha256(nnx.to_pure_dict(nnx.state(model))) == run.metrics["parameters_sha256"]


def test_other_randomness_is_refused_and_so_is_a_checkpoint_that_does_not_know_its_run() -> None:
    one, other = (describe_run(tiny(), "data", "tokens", jax.random.key(0, impl=i)) for i in ("threefry2x32", "rbg"))
    with pytest.raises(UsageError, match=r"\(key: threefry2x32 -> rbg\): .* --exp\.allow_changed key$"):
        check_run(one, other, ("train.lr",), "it")
    check_run(one, other, ("key",), "it")
    with pytest.raises(UsageError, match="it does not say what it was trained with"):
        check_run({"logs": []}, one, (), "it")


def test_a_checkpoint_that_has_all_updates_is_refused(store: Store, fourth: str) -> None:
    exp = {"resume_path": fourth, "allow_changed": ["train.max_steps"]}
    assert "raise --train.max_steps" in refusal(store, train={"max_steps": 4}, exp=exp)


def test_a_name_that_cannot_be_allowed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"names 'train\.speed', which is no setting"):
        tiny(exp={"allow_changed": ["train.speed"]})
    with pytest.raises(ValueError, match="leave one of them out"):
        tiny(exp={"resume": False, "resume_path": "x/step_1"})


def test_a_damaged_or_unfinished_checkpoint_is_refused(trained: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained.local(), folder)
    address = f"{folder}/checkpoints/step_8"
    assert find_checkpoint(address).local(tmp_path).is_dir()
    file = max((folder / "checkpoints" / "step_000008").rglob("*"), key=lambda f: f.is_file() and f.stat().st_size)
    file.write_bytes(b"x" * file.stat().st_size)
    with pytest.raises(Damaged, match=rf"step_000008 is damaged: .*{file.name} has been altered; start from another"):
        nanodlm.train(tiny(exp={"resume_path": address}), trained.store.uri())
    file.unlink()
    with pytest.raises(Damaged, match=rf"step_000008 is damaged: .*{file.name} is missing"):
        nanodlm.train(tiny(exp={"resume_path": address}), trained.store.uri())
    (folder / "parts" / "checkpoints" / "step_000012.json").unlink()
    for name, words in (
        ("step_12", r"no finished checkpoint step_12 in .*/run: there are step_000004, step_000008"),
        ("checkpoints", "must end in step_ and a number"),
        ("nowhere/step_8", "there are none"),
    ):
        with pytest.raises(UsageError, match=words):
            find_checkpoint(f"{folder}/{name}")


def test_a_checkpoint_in_a_bucket_is_copied_and_verified(trained: Artifact, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(f"{trained.local()}/", "/bucket/run/", recursive=True)
    part = find_checkpoint("memory://bucket/run/checkpoints/step_4")
    assert part.digest == find_checkpoint(f"{trained.uri}/step_4").digest
    assert (part.local(tmp_path / "scratch") / "model_state").is_dir()
    memory.pipe_file(f"/bucket/run/{part.files[0]['path']}", b"other")
    with pytest.raises(Damaged, match="has been altered"):
        part.local(tmp_path / "other")


# Which checkpoints are kept


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
    with Checkpoints(attempt, {}, keep=9) as checkpoints:

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
    assert {path.stem for path in (attempt.path / "parts" / "checkpoints").iterdir()} == {
        f"step_{step:06d}" for step in range(1, QUEUE + 2)
    }


def test_a_save_that_could_not_be_published_ends_the_run(tmp_path: Path) -> None:
    attempt = Away(Store(str(tmp_path)))
    attempt.back.set()
    attempt.error = Unreachable("the bucket does not answer")
    with pytest.raises(Unreachable), Checkpoints(attempt, {}, keep=9) as checkpoints:
        for step in range(1, QUEUE + 2):
            checkpoints.save(fake_state(step), step)
            time.sleep(0.2)
        raise AssertionError("nothing was said before the last save")
    with pytest.raises(Unreachable), Checkpoints(attempt, {}, keep=9) as checkpoints:
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


def test_without_validation_rows_the_training_bound_ranks_checkpoints(trained: Artifact) -> None:
    infos = {step: find_checkpoint(f"{trained.uri}/step_{step}").info for step in (4, 8, 12)}
    logs = {record["step"]: record["nats_per_token"] for record in infos[12]["logs"]}
    expected = {4: logs[3], 8: logs[6], 12: (logs[9] + logs[12]) / 2}
    assert {step: info["train_nats_per_token"] for step, info in infos.items()} == pytest.approx(expected)
    assert trained.metrics["best_update"] == min(expected, key=lambda step: expected[step])


# What is not finite


def test_a_loss_that_is_not_a_number_stops_the_run_before_it_is_saved(store: Store, fourth: str) -> None:
    train = {"lr": 1e30, "clip_grad_norm": 1.0}
    exp = {"resume_path": fourth, "allow_changed": ["train.lr"], "log_every": 100, "save_every": 1}
    with pytest.raises(NanodlmError, match="not a number at update") as caught:
        nanodlm.train(tiny(train=train, exp=exp), store.uri())
    found = re.search(r"at update (\d+) .*the last good checkpoint is (\S+/step_\d+): ", str(caught.value))
    assert found, caught.value
    assert found[2].endswith(f"step_{int(found[1]) - 1:06d}")
    assert find_checkpoint(found[2]).local(Path()).is_dir()
    assert not Path(found[2]).with_name(f"step_{int(found[1]):06d}").exists()
    model, _ = nanodlm.load(found[2])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(nnx.state(model)))


def test_a_run_that_has_saved_nothing_says_so(trained: Artifact, store: Store) -> None:
    config = tiny(train={"lr": 1e30, "clip_grad_norm": 0.0}, exp={"log_every": 1})
    with pytest.raises(NanodlmError, match=r"not a number at update .*no checkpoint was saved before"):
        nanodlm.train(config, store.uri())


def logger(said: list[dict[str, Any]], **train: Any) -> _Logger:
    config = tiny(train=train)

    def emit(kind: str, **fields: Any) -> None:
        said.append(fields)

    tracker: Any = SimpleNamespace(log=lambda record: None)
    return _Logger(config, [], emit, tracker, limit=50.0, last_good=lambda before: f"/before/{before}")


def scalars(bound: float) -> dict[str, Any]:
    return {"loss": jnp.float32(bound), "nats_per_token": jnp.float32(bound), "grad_norm": jnp.float32(1.0)}


def test_two_records_in_a_row_beyond_the_limit_stop_the_run() -> None:
    said: list[dict[str, Any]] = []
    log = logger(said)
    for step, bound in ((10, 60.0), (20, 5.0), (30, 51.0)):
        log.add(step, scalars(bound))
    log.add(40, scalars(1e6))
    with pytest.raises(NanodlmError, match=r"exploded at update 40, to 1000000 .* last good checkpoint is /before/30:"):
        log.flush()
    assert [fields["step"] for fields in said] == [10, 20, 30, 40]


def test_records_that_are_not_finite_are_written_as_null_when_updates_are_skipped() -> None:
    said: list[dict[str, Any]] = []
    log = logger(said, skip_nonfinite=True)
    log.add(1, {**scalars(float("nan")), "skipped": jnp.int32(1)})
    log.add(2, {**scalars(2.0), "skipped": jnp.int32(1)})
    log.flush()
    assert [(r["loss"], r["nats_per_token"], r["grad_norm"], r["skipped"]) for r in log.records] == [
        (None, None, 1.0, 1),
        (2.0, 2.0, 1.0, 1),
    ]
    assert log.mean_bound(0, 2) == {"train_nats_per_token": 2.0}
    assert json.loads(json.dumps(said, allow_nan=False))[0]["loss"] is None


class Fragile(Objective):
    """Has no finite loss for rows that begin with token 0."""

    def corrupt(self, x_0: jax.Array, key: jax.Array, segment_ids: jax.Array | None = None) -> Corruption:
        noised = super().corrupt(x_0, key, segment_ids)
        return noised._replace(weight=noised.weight / x_0[:, 0])


def test_an_update_that_is_not_finite_is_skipped_and_counted() -> None:
    config = tiny(train={"skip_nonfinite": True, "ema_decay": 0.5, "batch_size": 2})
    objective = Fragile(make_schedule("linear"), 4, estimator="count")
    network = Transformer(vocab_size=5, n_layers=1, n_heads=1, d_model=4, d_ff=4, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(network)
    optimizer = make_optimizer(config.train)
    step = jax.jit(partial(train_step, graphdef=graphdef, optimizer=optimizer, objective=objective, config=config))
    good, bad = jnp.ones((1, 2, 8), jnp.int32), jnp.ones((1, 2, 8), jnp.int32).at[0, 1, 0].set(0)
    start = init_state(config, nnx.to_pure_dict(params), optimizer)
    first, said = step(start, good, jax.random.key(0))
    assert (int(first["step"]), int(first["skipped"]), int(said["skipped"])) == (1, 0, 0)
    second, said = step(first, bad, jax.random.key(0))
    assert (int(second["step"]), int(second["skipped"]), int(said["skipped"])) == (2, 1, 1)
    assert not np.isfinite(said["loss"])
    same = ("model_state", "optimizer_state", "ema_state")
    jax.tree.map(np.testing.assert_array_equal, {n: second[n] for n in same}, {n: first[n] for n in same})
    third, said = step(second, good, jax.random.key(0))
    assert int(third["skipped"]) == 1
    assert np.isfinite(said["loss"])
    assert parameters_sha256(third["model_state"]) != parameters_sha256(first["model_state"])


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
    assert tiny(train={"skip_nonfinite": True}).training()["train"]["skip_nonfinite"] is True


# Processes


SAVE_ALL = {"save_every": 1, "log_every": 3, "val_rows": 0}


def words_for(config: Config, store: Path) -> tuple[str, ...]:
    """What follows `nanodlm train`."""
    file = store.parent / "config.json"
    file.write_text(config.model_dump_json())
    return (str(file), "--store", str(store))


def test_a_run_killed_while_it_saves_ends_with_the_bits_of_an_undisturbed_one(trained: Artifact, data: Path) -> None:
    config, attempts = tiny(exp=SAVE_ALL), 0
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
    """By default JAX keeps what took a second; this network's update may take less."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    environ = {"NANODLM_CACHE": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    words = words_for(tiny(train={"max_steps": 3}), data)
    kept = []
    for extra in ([], ["--rebuild"]):
        done = commands.nanodlm("train", *words, *extra, **environ)
        assert done.returncode == 0, done.stderr
        kept.append({path.name for path in (tmp_path / "cache" / "compiled").iterdir() if path.name.endswith("-cache")})
    assert any("train_step" in name for name in kept[0]), kept[0]
    assert kept[1] == kept[0]


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


def test_the_original_flags_start_from_a_checkpoint(
    trained: Artifact, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resume = ("--exp.resume", "--exp.resume_path", f"{trained.local()}/checkpoints/step_4")
    command = ["train", *words_for(tiny(), data), *resume, "--json"]
    with pytest.raises(SystemExit) as ended:
        main.main([*command, "--train.lr", "0.001"])
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "(train.lr: 0.008 -> 0.001): if that is meant, add --exp.allow_changed train.lr" in said
    with pytest.raises(SystemExit) as ended:
        main.main([*command, "--train.lr", "0.001", "--exp.allow_changed", "train.lr"])
    assert ended.value.code == 0
    changed = json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"]
    assert changed["resumed_from_update"] == 4
    assert changed["parameters_sha256"] != trained.metrics["parameters_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_killed_at_random_moments_ends_with_the_bits_of_an_undisturbed_one(
    seed: int, trained: Artifact, data: Path
) -> None:
    config = tiny(train={"max_steps": 300}, exp={"save_every": 3, "log_every": 10, "val_rows": 8, "keep_best": 2})
    expected = nanodlm.train(config, trained.store.uri())
    moments, reached = random.Random(seed), []
    for _ in range(8):
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
