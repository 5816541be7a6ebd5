"""The numbers of a training: fetched, recorded, and judged."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Array

from nanodlm.checkpoints import State
from nanodlm.config import Config
from nanodlm.errors import Emit, NanodlmError
from nanodlm.training.step import all_finite
from nanodlm.training.trackers import Tracker


@dataclass
class Logger:
    """Continues the records of a run; new ones are emitted as `progress`, in bits per byte, and given to a tracker."""

    config: Config
    records: list[dict[str, Any]]
    emit: Emit
    tracker: Tracker | None
    bits: float  # so many per byte are a nat per token
    last_good: Callable[[int], str]  # the address of the newest checkpoint before an update
    row_tokens: float  # those of a row, without padding, on average
    _waiting: tuple[int, dict[str, Array]] | None = None
    since: int = 0  # the update from which on the speed is measured
    began: float = field(default_factory=time.monotonic)  # when it was done; later by what was no training
    waited: float = 0.0  # seconds since then in which there were no rows
    _before: float = field(init=False)  # seconds of updates in runs that this one continues

    def __post_init__(self) -> None:
        self._before = self.records[-1].get("seconds", 0.0) if self.records else 0.0

    def wait(self, batches: Iterator[np.ndarray]) -> np.ndarray:
        """Return the rows of the next update, and count the time until they are there."""
        began = time.monotonic()
        rows = next(batches)
        self.waited += time.monotonic() - began
        return rows

    def add(self, step: int, scalars: dict[str, Array]) -> None:
        """Take the scalars of an update, which become a record at the next `flush`."""
        self.flush()
        self._waiting = (step, scalars)

    def flush(self) -> None:
        """Fetch and write the waiting record; numbers that are not finite are written as None."""
        if self._waiting is None:
            return
        (step, scalars), self._waiting = self._waiting, None
        values, train = self._fetch(step, scalars), self.config.train
        speed, seconds = {"tokens_per_second": 0.0, "waiting_share": 0.0}, 0.0
        if step > self.since:
            tokens = (step - self.since) * train.batch_size * train.grad_acc_steps * self.row_tokens
            seconds = time.monotonic() - self.began
            speed = {"tokens_per_second": round(tokens / seconds, 1), "waiting_share": round(self.waited / seconds, 4)}
        elif self.records:
            speed = {name: self.records[-1].get(name, 0.0) for name in speed}
        record = {"step": step, **values, **speed, "seconds": round(self._before + seconds, 3)}
        self.records.append(record)
        if self.tracker:
            self.tracker.log(record)
        # One batch is noisy: progress is the mean of ten.
        bounds = [r["nats_per_token"] for r in self.records[-10:] if r["nats_per_token"] is not None]
        smoothed = self.bits * sum(bounds) / len(bounds) if bounds else None
        shown = {"bits_per_byte": smoothed, **record}
        self.emit("progress", done=step, total=train.max_steps, unit="updates", **shown)

    def check(self, step: int, scalars: dict[str, Array], state: State) -> None:
        """Make sure that the state after an update is worth saving."""
        self.flush()
        self._fetch(step, scalars)
        if not all_finite(state):
            raise self._diverged(f"parameters or optimizer are not finite after update {step}", step)

    def _fetch(self, step: int, scalars: dict[str, Array]) -> dict[str, float | None]:
        values = {name: float(value) for name, value in scalars.items()}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad and not self.config.train.skip_nonfinite:
            found = ", ".join(f"{name} {values[name]}" for name in bad)
            raise self._diverged(f"the loss is not a number at update {step} ({found})", step)
        if "skipped" in values:
            values["skipped"] = int(values["skipped"])
        return {name: None if name in bad else value for name, value in values.items()}

    def _diverged(self, what: str, step: int) -> NanodlmError:
        good = self.last_good(step)
        found = f"the last good checkpoint is {good}" if good else "no checkpoint was saved before"
        remedy = "lower --train.lr or --train.clip_grad_norm, or add --train.skip_nonfinite"
        resume = ", and go on from it with --exp.resume_path and --exp.allow_changed" if good else ""
        return NanodlmError(f"{what}; {found}: {remedy}{resume}")
