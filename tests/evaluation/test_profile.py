"""The bound by position and by noise: both give it back, and tell what they say they tell."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanodlm.build import make_model
from nanodlm.config import ScoreConfig
from nanodlm.data import tokenizer
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.evaluation.scoring import draw
from nanodlm.model.transformer import Transformer
from nanodlm.stages import run as stages_run
from nanodlm.store import Artifact, Store
from tests.support.training import tiny

MASK = 257


def network(**objective: Any) -> Transformer:
    shape = {"seq_len": 8, "zero_init": False}
    return make_model(tiny(model=shape, objective=objective), Vocabulary.of(tokenizer.plain_bytes()))


def total(means: list[float | None], tokens: list[int]) -> float:
    return sum(mean * n for mean, n in zip(means, tokens, strict=True) if mean is not None)


@pytest.mark.parametrize("kind", ["absorbing", "uniform", "hybrid", "block", "autoregressive"])
def test_positions_and_noise_give_the_bound_back(kind: str) -> None:
    rows = list(np.random.default_rng(0).integers(0, 258, (11, 8), dtype=np.int32))  # some of it padding
    rows.append(rows[0][: 8 if kind in ("uniform", "hybrid") else 5])
    given, options = np.array([0, 3, 8, 7, 2, 1] * 2), ScoreConfig(batch_size=4, repeats=3)
    nats, _, _, profile = draw(network(kind=kind, block_size=3), rows, given, options)
    draws = 1 if kind == "autoregressive" else 3
    assert total(profile["by_position"], profile["position_tokens"]) == pytest.approx(draws * nats.sum())
    assert sum(profile["position_tokens"]) == draws * len(nats)
    if kind == "autoregressive":
        assert profile["by_noise"] is None
        return
    of = profile["by_noise"]
    assert total(of["nats_per_token"], of["tokens"]) == pytest.approx(draws * nats.sum())
    assert sum(of["tokens"]) == draws * len(nats)
    assert 0 < sum(of["draws"]) <= draws * 12 * (3 if kind == "block" else 1)


def test_under_masks_the_bound_at_a_share_is_the_cross_entropy_of_a_masked_token() -> None:
    model, row = network(kind="absorbing"), np.array([40, 50, 60, 70, 80, 90, 100, 110], np.int32)
    expected = []
    for i in range(8):  # of one masked token of eight
        log_p = jax.nn.log_softmax(model(jnp.asarray(row).at[i].set(MASK)[None], jnp.zeros(1))[0, i, :MASK])
        expected.append(-float(log_p[row[i]]))
    of = draw(model, [row] * 64, np.zeros(64, int), ScoreConfig(batch_size=64, repeats=40)).profile["by_noise"]
    lowest = next(i for i, n in enumerate(of["draws"]) if n)
    assert of["masked_share"][lowest] - 1 / 32 <= 1 / 8 <= of["masked_share"][lowest] + 1 / 32
    assert of["draws"][lowest] == 320
    assert of["nats_per_token"][lowest] == pytest.approx(np.mean(expected), rel=0.02)
    assert min(expected) < of["nats_per_token"][lowest] < max(expected)


def test_from_left_to_right_each_position_has_the_mean_of_its_tokens() -> None:
    model = network(kind="autoregressive")
    rows = list(np.random.default_rng(0).integers(0, 256, (6, 8), dtype=np.int32))
    drawn = draw(model, rows, np.zeros(6, int), ScoreConfig(batch_size=4))
    assert drawn.profile["by_position"] == pytest.approx(drawn.nats.reshape(6, 8).mean(axis=0).tolist())


def test_the_evaluation_keeps_the_profile_of_its_validation_bound(trained: Artifact, models: Store) -> None:
    artifact, _ = stages_run.run_stage("evaluate", tiny(), models)
    profile, m = json.loads(artifact.file("bound_profile.json").read_text()), artifact.metrics
    assert len(profile["by_position"]) == 32
    for means, n in (
        (profile["by_position"], profile["position_tokens"]),
        (profile["by_noise"]["nats_per_token"], profile["by_noise"]["tokens"]),
    ):
        assert sum(n) == m["scored_tokens"]
        assert total(means, n) / sum(n) == pytest.approx(m["val_nats_per_token"], rel=1e-9)
