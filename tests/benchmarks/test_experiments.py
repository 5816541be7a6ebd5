"""The race and the ablations: that they train and score what they say, at sizes that take seconds."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nanodlm.bench import experiments
from nanodlm.config import PRESETS, Config
from nanodlm.data import tokenizer
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.errors import UsageError
from nanodlm.store import Store
from nanodlm.training import plain
from tests.support.commands import nanodlm, result_of, speeches

FLAGS = ["--data.source", *speeches(3), "--data.val_tokens", "1000", "--data.tokenizer", "bytes"]
FLAGS += "--model.seq_len 16 --model.n_layers 1 --model.n_heads 2 --model.d_model 16 --model.d_ff 32".split()
FLAGS += "--train.batch_size 4 --train.optimizer adamw --eval.batch_size 8".split()


def tiny(**groups: dict[str, Any]) -> Config:
    base = PRESETS["demo"].replace(
        data={"source": speeches(3), "val_tokens": 1000, "tokenizer": "bytes"},
        model={"seq_len": 16, "n_layers": 1, "n_heads": 2, "d_model": 16, "d_ff": 32},
        train={"batch_size": 4, "optimizer": "adamw"},
        eval={"max_rows": 20, "batch_size": 8},
    )
    return base.replace(**groups)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(str(tmp_path_factory.mktemp("store")))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_variant_is_a_valid_configuration(preset: str) -> None:
    config = PRESETS[preset]
    changed = {name: config.replace(**groups) for name, groups in experiments.variants(100).items()}
    assert changed["preset"] == config
    differing = {name for name, other in changed.items() if other != config}
    assert {"adamw-8e-3", "no-zero-init", "ema-0.99", "independent-times"} <= differing
    assert len({"qk-norm", "no-qk-norm"} & differing) == 1, "one of the two is the preset"


def test_batches_visit_every_row_once_an_epoch_in_an_order_of_the_seed() -> None:
    rows = np.arange(10, dtype=np.int32)[:, None]
    stream = experiments._batches(rows, (2, 2), seed=1)
    drawn = [next(stream) for _ in range(5)]
    assert drawn[0].shape == (2, 2, 1)
    visited = np.concatenate(drawn).reshape(-1)
    assert sorted(visited[:10]) == sorted(visited[10:]) == list(range(10))
    assert not np.array_equal(visited[:10], visited[10:])
    assert np.array_equal(drawn[0], next(experiments._batches(rows, (2, 2), seed=1)))
    assert next(experiments._batches(rows[:3], (1, 8), seed=0)).shape == (1, 8, 1), "more rows than there are"


@pytest.mark.slow
def test_the_plain_network_is_normal_with_deviation_0_02_and_begins_at_the_uniform_law() -> None:
    shape = {"n_layers": 4, "n_heads": 4, "d_model": 128, "d_ff": 512}
    model = plain.make_network(Vocabulary.of(tokenizer.plain_bytes()).padded_size, **shape)
    params = nnx.to_pure_dict(nnx.split(model)[1])
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        if path[-1].key == "scale":
            assert (leaf == 1).all()
        else:
            assert float(leaf.std()) == pytest.approx(0.02, rel=0.05)
    assert model.head is not None
    graphdef, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    start = plain.init_state(params, updates=100)
    rows = jax.random.randint(jax.random.key(1), (1, 32, 32), 0, 257)
    step = jax.jit(plain.plain_step, static_argnames=("graphdef", "mask_id"))

    def after(done: int) -> tuple[float, float]:
        state = {**start, "step": jnp.int32(done)}
        new, scalars = step(state, rows, jax.random.key(0), graphdef=graphdef, mask_id=257)
        assert int(new["step"]) == done + 1
        moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), new["model_state"], params)
        return float(scalars["loss"]), max(jax.tree.leaves(moved))

    loss, first = after(0)
    assert abs(loss - math.log(257)) < 1
    assert first == pytest.approx(3e-4, rel=0.1)  # Adam's first step is the learning rate
    assert after(50)[1] == pytest.approx(first / 2, rel=0.1)
    assert after(100)[1] == 0


@pytest.mark.slow
def test_the_race_scores_the_same_tokens_and_ends_when_the_plain_bound_is_reached(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiments, "PLAIN_LENGTH", 24)
    monkeypatch.setattr(experiments, "PLAIN_ROWS", 2)
    monkeypatch.setattr(experiments, "SPEED_UPDATES", 2)
    scored = []
    real = experiments.score

    def score(model: Any, encoding: Any, rows: list[np.ndarray], *args: Any, **options: Any) -> dict[str, Any]:
        scored.append(rows)
        return real(model, encoding, rows, *args, **options)

    monkeypatch.setattr(experiments, "score", score)
    said = []

    def emit(kind: str, **fields: Any) -> None:
        said.append(fields["text"]) if kind == "message" else None

    result = experiments.race(tiny(), store, minutes=1e-4, updates=[20, 1], emit=emit)
    assert result["plain"]["updates"] >= 3
    assert result["plain"]["tokens"] == result["plain"]["updates"] * 2 * 24
    assert [len(rows[0]) for rows in scored[:2]] == [24, 16]
    assert all(np.array_equal(np.concatenate(rows), np.concatenate(scored[0])) for rows in scored)
    reached = [row["bits_per_byte"] <= result["plain"]["bits_per_byte"] for row in result["ours"]]
    assert [row["updates"] for row in result["ours"]] == [1, 20][: len(reached)]
    assert not any(reached[:-1])
    assert reached[-1] == (result["ratio"] is not None)
    assert result["ratio"] == pytest.approx(result["plain"]["seconds"] / result["ours"][-1]["seconds"])
    assert result["ratio_with_compilation"] > 0
    assert any("the plain recipe" in text for text in said)
    json.dumps(result)


@pytest.mark.slow
def test_an_ablation_compares_by_seed_and_keeps_what_is_done(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "runs" / "demo.jsonl"
    options: dict[str, Any] = {"seeds": 2, "updates": 4, "only": ["no-conv"], "out": out}
    table = experiments.ablation(tiny(), store, **options)
    rows = {row["variant"]: row for row in table}
    assert set(rows) == {"preset", "no-conv"}
    assert [row["bits_per_byte"] for row in table] == sorted(row["bits_per_byte"] for row in table)
    runs = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(run["variant"], run["seed"], run["updates"]) for run in runs] == [
        ("preset", 0, 4),
        ("preset", 1, 4),
        ("no-conv", 0, 4),
        ("no-conv", 1, 4),
    ]
    assert runs[0]["bits_per_byte"] != runs[1]["bits_per_byte"]
    bits = np.array([run["bits_per_byte"] for run in runs])
    assert rows["no-conv"]["difference"] == pytest.approx(np.mean(bits[2:] - bits[:2]))
    assert rows["no-conv"]["difference_stderr"] == pytest.approx(np.std(bits[2:] - bits[:2], ddof=1) / math.sqrt(2))
    assert rows["preset"]["difference"] is None
    lines = out.read_text().splitlines()
    out.write_text("\n".join([*lines[:3], lines[3][:40]]))  # killed while writing
    trained = []
    real = experiments.Trainer.__call__

    def count(self: experiments.Trainer, config: Config, emit: Any) -> experiments.Trained:
        trained.append(config)
        return real(self, config, emit)

    monkeypatch.setattr(experiments.Trainer, "__call__", count)
    again = {row["variant"]: row for row in experiments.ablation(tiny(), store, **options)}
    assert len(trained) == 1
    assert again["no-conv"]["bits_per_byte"] == pytest.approx(rows["no-conv"]["bits_per_byte"], rel=1e-6)
    experiments.ablation(tiny(), store, **options)
    assert len(trained) == 1, "the line behind the one cut short was read"


def test_a_variant_that_diverged_has_no_numbers_and_comes_last() -> None:
    finite = [{"bits_per_byte": 2.0, "seconds": 1.0}, {"bits_per_byte": 2.2, "seconds": 3.0}]
    diverged = [{"bits_per_byte": 1.0, "seconds": 1.0}, {"bits_per_byte": None, "seconds": 1.0}]
    row = experiments._compare("a", diverged, finite)
    assert row["bits_per_byte"] is row["difference"] is None
    row = experiments._compare("a", finite, diverged)
    assert (row["bits_per_byte"], row["seconds"], row["difference"]) == (pytest.approx(2.1), 2.0, None)
    single = experiments._compare("a", finite[:1], finite[1:])
    assert single["difference"] == pytest.approx(-0.2)
    assert single["sd"] is single["difference_stderr"] is None


def test_experiments_refuse_what_measures_nothing(store: Store, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"raise --minutes"):
        experiments.race(tiny(), store, minutes=0)
    for updates in ([], [0, 5]):
        with pytest.raises(UsageError, match=r"--updates lists numbers"):
            experiments.race(tiny(), store, updates=updates)
    with pytest.raises(UsageError, match=r"raise --seeds"):
        experiments.ablation(tiny(), store, seeds=0)
    with pytest.raises(UsageError, match=r"no variant 'nothing': choose from preset"):
        experiments.ablation(tiny(), store, only=["nothing"])
    notes = tmp_path / "notes.md"
    notes.write_text("# Notes\n")
    with pytest.raises(UsageError, match=r"another file with --out"):
        experiments.ablation(tiny(), store, updates=1, only=["no-conv"], out=notes)


@pytest.mark.slow
def test_the_command_prints_a_table_and_one_object(store: Store, tmp_path: Path) -> None:
    command = ["bench", "ablation", "demo", *FLAGS, "--store", store.uri(), "--only", "untied", "no-conv"]
    out = ["--out", str(tmp_path / "runs.jsonl"), "--eval_rows", "10", "--updates", "1", "--seeds", "1", "--json"]
    done = nanodlm(*command, *out)
    rows = result_of(done)["ablation"]
    assert {row["variant"] for row in rows} == {"preset", "untied", "no-conv"}
    assert done.stdout.startswith("| variant | bits per byte |")
    assert len(done.stdout.splitlines()) == 2 + 3 + 1
    assert "3/3" in done.stderr
