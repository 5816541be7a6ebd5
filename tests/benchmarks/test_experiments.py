"""The experiments in their smallest form: that they train and score what they say."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro

from benchmarks.ablation import ablation, compare, variants
from benchmarks.anchors import anchors
from benchmarks.bucket import bucket
from benchmarks.cache import cache
from benchmarks.cost import cost
from benchmarks.orchestration import orchestration
from benchmarks.orders import orders
from benchmarks.plain import plain
from benchmarks.race import race
from benchmarks.runs import build, measure
from benchmarks.startup import startup
from benchmarks.variance import variance
from nanodlm.config import PRESETS, Config
from nanodlm.errors import UsageError
from nanodlm.store import Store
from tests.support.helpers import prose


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The demo in small, with two updates."""
    corpus = tmp_path_factory.mktemp("corpus") / "prose.txt"
    corpus.write_text("\n\n".join(prose(100)))
    return PRESETS["demo"].replace(
        data={"source": str(corpus), "sample_by": "paragraph", "val_tokens": 1000, "tokenizer": "bytes"},
        model={"seq_len": 16, "n_layers": 1, "n_heads": 2, "d_model": 16, "d_ff": 32, "conv_width": 3},
        train={"batch_size": 4, "optimizer": "adamw", "max_steps": 2, "cooldown_steps": 1},
        eval={"max_rows": 24, "batch_size": 8},
        exp={"val_rows": 0},
        sample={"num_samples": 2, "num_steps": 4},
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("store"))


@pytest.mark.slow
def test_the_race_scores_the_same_tokens_and_ends_when_the_plain_bound_is_reached(config: Config, store: str) -> None:
    slow = config.replace(model={"seq_len": 24}, train={"max_steps": 1000, "lr": 1e-9, "warmup_steps": 0})
    with pytest.raises(UsageError, match="the same held-out tokens"):
        race(config, slow, store)
    config = config.replace(eval={"max_rows": None})
    result = race(config, slow, store, minutes=1e-5, updates=(3, 2))
    assert result["plain"]["tokens"] == result["plain"]["updates"] * 4 * 24
    artifacts = [Store(store).find(stage, fingerprint) for stage, fingerprint in Store(store) if stage == "evaluate"]
    assert {artifact.metrics["scored_tokens"] for artifact in artifacts} == {1000}
    reached = [row["bits_per_byte"] <= result["plain"]["bits_per_byte"] for row in result["ours"]]
    assert [row["updates"] for row in result["ours"]] == [2, 3][: len(reached)]
    assert not any(reached[:-1])
    ratio = result["plain"]["seconds"] / result["ours"][-1]["seconds"]
    assert result["ratio"] == (pytest.approx(ratio) if reached[-1] else None)


def test_plain_updates_are_timed_beside_ours(config: Config) -> None:
    found = plain(config, steps=1)
    assert found["speedup"] == pytest.approx(found["plain_step_seconds"] / found["step_seconds"])


@pytest.mark.slow
def test_an_anchor_in_small_has_rows_of_every_objective_and_recipe(
    config: Config, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = anchors(config.data.source[0], "chars", store, updates=2, recipes=("own",))
    assert [(row["objective"], row["recipe"]) for row in found] == [("autoregressive", "own"), ("absorbing", "own")]
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.slow
def test_the_cost_of_updates_is_told_by_the_rate_of_a_few_rows(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = cost(("shakespeare",), rows=2, steps=1, updates=(10, 20))
    assert row["tokens"] == 64 * 256
    assert row["seconds"][1] == 2 * row["seconds"][0] == pytest.approx(20 * row["flops"] / row["flops_per_second"])
    assert "| shakespeare | 16,384 |" in capsys.readouterr().out


@pytest.mark.slow
def test_the_way_to_the_first_update_is_told_in_parts_that_add_up(config: Config, tmp_path: Path) -> None:
    found = startup(config.replace(exp={"log_every": 1}), repeats=1, folder=str(tmp_path))
    assert list(found) == ["import", "first", "second", "built", "first_training", "second_training"]
    for name in ("first", "first_training", "second_training"):
        assert found[name]["seconds"] == pytest.approx(sum(found[name]["parts"].values()), abs=0.05)
    compiled, loaded = (list(found[name]["parts"].values())[3] for name in ("first_training", "second_training"))
    assert loaded < compiled


SCRIPTS = [race, ablation, variance, bucket, orchestration, orders, plain, cost, anchors, startup]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_lists_its_flags(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tyro.cli(script, args=["--help"])
    assert ("--train.max-steps" in capsys.readouterr().out) == (script not in (bucket, cost, anchors))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_variant_is_a_valid_configuration(preset: str) -> None:
    changed = {name: PRESETS[preset].replace(**groups) for name, groups in variants(100).items()}
    differing = {name for name, other in changed.items() if other != PRESETS[preset]}
    assert {"adamw-8e-3", "no-zero-init", "ema-0.99", "independent-times"} <= differing - {"preset"}
    assert len({"preset", "qk-norm", "no-qk-norm"} - differing) == 2


@pytest.mark.slow
def test_an_ablation_finds_its_finished_runs_again(
    config: Config, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table = ablation(config, store, seeds=1, only=("no-conv",))
    rows = {row["variant"]: row for row in table}
    assert set(rows) == {"preset", "no-conv"}
    assert [row["bits_per_byte"] for row in table] == sorted(row["bits_per_byte"] for row in table)
    assert rows["preset"]["bits_per_byte"] == measure(config, Store(store))["bits_per_byte"]
    assert rows["no-conv"]["difference"] == rows["no-conv"]["bits_per_byte"] - rows["preset"]["bits_per_byte"]
    assert ablation(config, store, seeds=1, only=("no-conv",)) == table, "the seconds as well: nothing was trained"
    assert capsys.readouterr().out.startswith("| variant | bits per byte |")


def test_variants_are_compared_seed_by_seed_and_one_that_diverged_has_no_numbers() -> None:
    preset: list[Any] = [{"bits_per_byte": 2.0, "seconds": 1.0}, {"bits_per_byte": 2.2, "seconds": 3.0}]
    other: list[Any] = [{"bits_per_byte": 2.1, "seconds": 1.0}, {"bits_per_byte": 2.5, "seconds": 1.0}]
    row = compare("other", other, preset)
    assert row["difference"] == pytest.approx(0.2)
    assert row["difference_stderr"] == pytest.approx(np.std([0.1, 0.3], ddof=1) / math.sqrt(2))
    assert set(compare("other", [other[0], None], preset).values()) == {"other", None}
    assert compare("other", other, [preset[0], None])["difference"] is None
    single = compare("other", other[:1], preset[1:])
    assert (single["difference"], single["sd"]) == (pytest.approx(-0.1), None)


def test_experiments_refuse_what_measures_nothing(config: Config, store: str) -> None:
    with pytest.raises(UsageError, match=r"no variant 'nothing': choose from preset"):
        ablation(config, store, only=("nothing",))
    with pytest.raises(UsageError, match="no estimators to compare"):
        variance(config.replace(objective={"kind": "autoregressive"}), store)
    with pytest.raises(UsageError, match="used in place"):
        bucket(store)


@pytest.mark.slow
def test_the_estimators_of_a_trained_models_bound_agree_and_vary_less_the_better_they_are(
    config: Config, store: str
) -> None:
    rows = {row["estimator"]: row for row in variance(config, store, draws=48)}
    assert len(rows) == 6
    count = rows["count, independent"]
    assert rows["count, systematic"]["bound_sd"] < rows["continuous, independent"]["bound_sd"]
    for row in rows.values():  # the same number, whatever estimates it
        assert row["gradient_noise"] > 0
        assert abs(row["bound"] - count["bound"]) < 4 * math.hypot(row["bound_error"], count["bound_error"])


@pytest.mark.slow
def test_more_orders_are_a_tighter_bound_and_the_bound_is_their_mean(config: Config, store: str) -> None:
    rows = {row["order"]: row for row in orders(config, store, rows=24, most=16)}
    bound, *several = (row["nats_per_token"] for name, row in rows.items() if "16 draws" in name or "random" in name)
    assert several == sorted(several, reverse=True)
    assert bound == pytest.approx(several[0], rel=0.02)
    assert rows["surest first"]["calls"] == 16


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_pipeline_runs_both_ways_and_again_from_the_store(config: Config) -> None:
    result = orchestration(config.replace(train={"max_steps": 60}), repeats=1)
    assert 0 < result["cached_run_seconds"] < result["flow_seconds"]
    assert len(result["train_ratios"]) == 1
    # The clock of a process ticks every hundredth of a second: one that waits may have used none of it.
    assert 0 <= result["train_beside_direct"] < 4
    assert 0 <= result["train_beside_flow"] < 4


@pytest.mark.slow
def test_a_cache_of_the_whole_text_gives_its_own_law_and_smaller_ones_are_near(config: Config, store: str) -> None:
    model = build(config, Store(store), "train")["train"].uri
    small, whole = cache(model, blocks=(4, 16), rows=2)
    assert abs(whole["kl"]) < 1e-6
    assert whole["agree"] == 1
    assert 0 <= small["kl"] < 0.1 * small["entropy"]
    with pytest.raises(UsageError, match="block models have no cache for parts of a row"):
        cache(build(config.replace(objective={"kind": "block", "block_size": 4}), Store(store), "train")["train"].uri)
