"""The variance experiment, on a tiny trained model."""

import math
from typing import Any

import pytest

import nanodlm
from nanodlm.bench import experiments
from nanodlm.errors import UsageError
from nanodlm.store import Store
from tests.training.test_loop import tiny


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(str(tmp_path_factory.mktemp("store")))


@pytest.mark.slow
def test_the_variance_benchmark_measures_every_estimator_of_a_trained_model(store: Store) -> None:
    nanodlm.train(tiny(), store.uri())
    rows = experiments.variance(tiny(train={"batch_size": 4}), store, draws=48)
    assert [row["estimator"] for row in rows] == [label for label, _, _ in experiments.ESTIMATORS]
    by_name = {row["estimator"]: row for row in rows}
    assert by_name["count, systematic"]["bound_sd"] < by_name["continuous, independent"]["bound_sd"]
    assert all(row["gradient_noise"] > 0 for row in rows)
    for row in rows:  # the same number, whatever estimates it
        assert abs(row["bound"] - rows[3]["bound"]) < 4 * math.hypot(row["bound_error"], rows[3]["bound_error"])


@pytest.mark.parametrize(
    ("groups", "draws", "message"),
    [
        ({"objective": {"kind": "autoregressive"}}, 8, "no estimators to compare"),
        ({"train": {"batch_size": 3}}, 8, "use an even --train.batch_size"),
        ({}, 1, "raise --draws"),
    ],
)
def test_the_variance_benchmark_refuses_what_it_cannot_measure(
    store: Store, groups: dict[str, Any], draws: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        experiments.variance(tiny(**groups), store, draws=draws)
