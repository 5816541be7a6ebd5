"""What is recorded of a training, and what ends one that diverges."""

import json
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from nanodlm.errors import NanodlmError
from nanodlm.training.logger import Logger
from tests.support.training import tiny


def logger(said: list[dict[str, Any]], records: Any = (), **train: Any) -> Logger:
    tracker: Any = SimpleNamespace(log=lambda record: None)
    options: Any = {"bits": 2.0, "last_good": lambda before: f"/before/{before}", "row_tokens": 32}
    return Logger(tiny(train=train), [*records], lambda _, **fields: said.append(fields), tracker, **options)


def scalars(bound: float) -> dict[str, Any]:
    return {"loss": jnp.float32(bound), "nats_per_token": jnp.float32(bound), "grad_norm": jnp.float32(1.0)}


def test_progress_is_smoothed_and_what_is_no_number_ends_the_run() -> None:
    said: list[dict[str, Any]] = []
    log = logger(said)
    for step, bound in ((10, 60.0), (20, 5.0), (30, float("nan"))):
        log.add(step, scalars(bound))
    with pytest.raises(NanodlmError, match=r"not a number at update 30 .* last good checkpoint is /before/30:"):
        log.flush()
    assert [fields["step"] for fields in said] == [10, 20]
    assert said[1]["bits_per_byte"] == pytest.approx(2 * (60 + 5) / 2), "in the unit of the result"


def test_records_that_are_not_finite_are_written_as_null_when_updates_are_skipped() -> None:
    said: list[dict[str, Any]] = []
    log = logger(said, skip_nonfinite=True)
    log.add(1, {**scalars(float("nan")), "skipped": jnp.int32(1)})
    log.add(2, {**scalars(2.0), "skipped": jnp.int32(1)})
    log.flush()
    found = [(r["loss"], r["nats_per_token"], r["grad_norm"], r["skipped"]) for r in log.records]
    assert found == [(None, None, 1.0, 1), (2.0, 2.0, 1.0, 1)]
    assert json.loads(json.dumps(said, allow_nan=False))[0]["loss"] is None


def test_the_share_of_the_time_without_rows_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = 100.0, list[dict[str, Any]]()
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def batches() -> Iterator[np.ndarray]:
        nonlocal now
        while True:
            now += 1.0
            yield np.zeros((1, 1, 1), np.int32)

    log, rows = logger(said), batches()
    log.wait(rows)  # before the clock runs, while the program is compiled
    log.since, log.began, log.waited = 1, now, 0.0
    log.wait(rows)
    now += 3.0
    log.add(2, scalars(2.0))
    log.flush()
    assert [(fields["step"], fields["waiting_share"], fields["seconds"]) for fields in said] == [(2, 0.25, 4.0)]
    again = logger(said, log.records)  # a run that goes on from there
    again.since, again.began = 2, now
    now += 5.0
    again.add(3, scalars(2.0))
    again.flush()
    assert said[-1]["seconds"] == 9.0
