"""The record of a run, for whoever watches it, and Weights & Biases, for whoever compares runs."""

import contextlib
import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nanodlm.config import Config, explain
from nanodlm.errors import Emit, NanodlmError, UsageError
from nanodlm.store.cache import cache_dir


def check_packages(config: Config) -> None:
    """Refuse settings that ask for a tracker whose package is not installed."""
    if config.exp.use_wandb and find_spec("wandb") is None:
        raise UsageError("--exp.use_wandb needs wandb: pip install -c constraints.txt -e '.[wandb]'")


class Tracker(contextlib.AbstractContextManager["Tracker"]):
    """Writes log records to a JSONL file and, with `exp.use_wandb`, to W&B, which may fail without ending the run."""

    def __init__(self, config: Config, path: Path, run_id: str, records: list[dict[str, Any]], emit: Emit):
        """Write records to the file `path`, one a line, as they come; messages say what becomes of W&B.

        `run_id` names the run there, where one that exists goes on. `records` are what a resumed run has logged before:
        W&B has them already, the file begins with them. Unless `$WANDB_DIR` is set, `wandb/` lies in the cache.
        """
        check_packages(config)
        self._emit, self._wandb = emit, _start(config, run_id, emit) if config.exp.use_wandb else None
        self._file = path.open("w", buffering=1)
        self._write(*records)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Write what is left and end what was started; W&B learns whether the run was cut short."""
        self._file.close()
        self._tell(lambda run: _finish(run, failed=kind is not None))

    def log(self, record: dict[str, Any]) -> None:
        """Write one record; its `step` is the number of updates done."""
        self._write(record)
        self._tell(lambda run: run.log({k: v for k, v in record.items() if k != "step"}, step=record["step"]))

    def _write(self, *records: dict[str, Any]) -> None:
        self._file.writelines(json.dumps(record, allow_nan=False, sort_keys=True) + "\n" for record in records)

    def _tell(self, tell: Callable[[Any], None]) -> None:
        try:
            if self._wandb:
                tell(self._wandb)
        except (Exception, SystemExit) as error:  # W&B exits when its process has ended badly
            with contextlib.suppress(Exception, SystemExit):
                _finish(self._wandb, failed=True)
            self._wandb = None
            self._emit("message", text=f"W&B failed and gets no more records, the run goes on: {explain(error)}")


def _start(config: Config, run_id: str, emit: Emit) -> Any:
    """Start a run at Weights & Biases, apart from any that the process has besides."""
    import wandb

    folder = Path(os.environ.get("WANDB_DIR") or cache_dir())
    folder.mkdir(parents=True, exist_ok=True)
    called = {"project": config.exp.project_name, "name": config.exp.run_name or None, "id": run_id}
    options: dict[str, Any] = {**called, "resume": "allow", "reinit": "create_new", "dir": str(folder)}
    # What is not uploaded 30 s after the end lies in the run's folder, for `wandb sync`.
    settings = wandb.Settings(silent=True, console="off", finish_timeout=30.0)
    try:
        run = wandb.init(config=config.model_dump(), settings=settings, **options)
    except Exception as error:
        remedy = "run `wandb login`, set WANDB_MODE=offline, or leave out --exp.use_wandb"
        raise NanodlmError(f"W&B did not start ({explain(error)}): {remedy}") from error
    emit("message", text=f"records for W&B: {Path(run.dir).parent if run.offline else run.url}")
    return run


def _finish(run: Any, failed: bool) -> None:
    import wandb

    try:
        run.finish(exit_code=int(failed))
    finally:
        if wandb.run is None:
            wandb.teardown()  # ends W&B's own process, which no other run of ours needs
