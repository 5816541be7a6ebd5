"""The bound by position and by noise: both give it back, and tell what they say they tell."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanodlm.config import ScoreConfig
from nanodlm.evaluation.scoring import draw
from nanodlm.stages import run as stages_run
from nanodlm.store import Artifact, Store
from tests.support.training import tiny, untrained

MASK = 257


def total(means: list[float | None], tokens: list[int]) -> float:
    return sum(mean * n for mean, n in zip(means, tokens, strict=True) if mean is not None)


@pytest.mark.parametrize("kind", ["absorbing", "uniform", "hybrid", "block", "autoregressive"])
def test_positions_and_noise_give_the_bound_back(kind: str) -> None:
    rows = list(np.random.default_rng(0).integers(0, 258, (11, 8), dtype=np.int32))  # some of it padding
    rows.append(rows[0][: 8 if kind in ("uniform", "hybrid") else 5])
    given, options = np.array([0, 3, 8, 7, 2, 1] * 2), ScoreConfig(batch_size=4, repeats=3)
    nats, _, _, profile = draw(untrained(kind=kind, block_size=3), rows, given, options)
    of, draws = profile["by_noise"], 1 if kind == "autoregressive" else 3
    assert (of is None) == (draws == 1)
    pairs = [(profile["by_position"], profile["position_tokens"])] + (
        [(of["nats_per_token"], of["tokens"])] if of else []
    )
    for means, tokens in pairs:
        assert total(means, tokens) == pytest.approx(draws * nats.sum())
        assert sum(tokens) == draws * len(nats)
    assert not of or 0 < sum(of["draws"]) <= draws * 12 * (3 if kind == "block" else 1)


def test_under_masks_the_bound_at_a_share_is_the_cross_entropy_of_a_masked_token() -> None:
    model, row = untrained(kind="absorbing"), np.array([40, 50, 60, 70, 80, 90, 100, 110], np.int32)
    expected = []
    for i in range(8):  # of one masked token of eight
        log_p = jax.nn.log_softmax(model(jnp.asarray(row).at[i].set(MASK)[None], jnp.zeros(1))[0, i, :MASK])
        expected.append(-float(log_p[row[i]]))
    of = draw(model, [row] * 64, np.zeros(64, int), ScoreConfig(batch_size=64, repeats=40)).profile["by_noise"]
    assert [n for n in of["draws"] if n] == [320] * 8
    assert (of["draws"][1], of["masked_share"][1]) == (320, 1.5 / 16)  # (1/16, 1/8]
    assert of["nats_per_token"][1] == pytest.approx(np.mean(expected), rel=0.02)


def test_the_evaluation_keeps_the_profile_of_its_validation_bound(trained: Artifact, models: Store) -> None:
    artifact, _ = stages_run.run_stage("evaluate", tiny(), models)
    profile, m = json.loads(artifact.file("bound_profile.json").read_text()), artifact.metrics
    of = profile["by_noise"]
    for means, n in ((profile["by_position"], profile["position_tokens"]), (of["nats_per_token"], of["tokens"])):
        assert total(means, n) / m["scored_tokens"] == pytest.approx(m["val_nats_per_token"], rel=1e-9)
