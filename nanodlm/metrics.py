"""Records of what a run does: an event log for whoever watches, and an optional tracker."""

import json
import math
import time
from pathlib import Path
from typing import Any

from nanodlm.config import Config
from nanodlm.errors import UsageError


class EventLog:
    """Appends one JSON object per event to a file; call it as `emit(kind, **fields)`."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", buffering=1)

    def __call__(self, kind: str, **fields: Any) -> None:
        """Write one event."""
        self._file.write(json.dumps({"time": round(time.time(), 3), "event": kind, **fields}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Tracker:
    """Sends records to Weights & Biases when the configuration asks for it."""

    def __init__(self, config: Config):
        self._run = None
        if config.exp.use_wandb:
            try:
                import wandb  # type: ignore[import-not-found]
            except ImportError as error:
                raise UsageError("--exp.use_wandb needs W&B: pip install 'nanodlm[wandb]'") from error
            self._run = wandb.init(
                project=config.exp.project_name, name=config.exp.run_name or None, config=config.model_dump()
            )

    def log(self, record: dict[str, Any]) -> None:
        """Send one record; its `step` is the number of updates done."""
        if self._run is not None:
            self._run.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    def close(self) -> None:
        """Send what is left."""
        if self._run is not None:
            self._run.finish()


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Total nats over a text of so many bytes, as bits per byte.

    >>> bits_per_byte(math.log(2) * 8, 4)
    2.0
    """
    return nats / math.log(2) / n_bytes
