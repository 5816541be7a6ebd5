"""The record of a run, for whoever watches it, and trackers, for whoever compares runs."""

import contextlib
import json
import os
import re
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nanodlm.config import Config, explain
from nanodlm.errors import Emit, NanodlmError, UsageError
from nanodlm.store.cache import cache_dir


def check_packages(config: Config) -> None:
    """Refuse settings that ask for a tracker whose package is not installed."""
    for name, package in (("wandb", "wandb"), ("tensorboard", "tensorboardX")):
        if getattr(config.exp, f"use_{name}") and find_spec(package) is None:
            raise UsageError(f"--exp.use_{name} needs {package}: pip install 'nanodlm[{name}]'")


class Tracker(contextlib.AbstractContextManager["Tracker"]):
    """Writes log records to a JSONL file and, where the configuration asks for it, to W&B and TensorBoard."""

    def __init__(self, config: Config, path: Path, run_id: str, records: list[dict[str, Any]], emit: Emit):
        """Open all that `config.exp` asks for; messages say where to look, and what failed and gets no more records.

        Records go to the JSONL file `path`, one a line, as they come. `run_id` names the run at W&B, where one that
        exists goes on, and in TensorBoard's folder. `records` are what a resumed run has logged before: W&B has them
        already, the others begin with them. `tensorboard/` and, unless `$WANDB_DIR` is set, `wandb/` lie in the cache.
        """
        self._emit = emit
        self._others: dict[str, _Wandb | _TensorBoard] = {}
        check_packages(config)
        self._file = path.open("w", buffering=1)
        try:
            self._file.writelines(json.dumps(record, allow_nan=False, sort_keys=True) + "\n" for record in records)
            if config.exp.use_tensorboard:
                name = re.sub(r"[^\w.-]+", "_", f"{config.exp.run_name}-{run_id}".lstrip("-"))
                folder = cache_dir() / "tensorboard" / name
                self._others["TensorBoard"] = _TensorBoard(folder, records)
                emit("message", text=f"records for TensorBoard: {folder}")
            if config.exp.use_wandb:
                self._others["W&B"] = run = _Wandb(config, run_id)
                emit("message", text=f"records for W&B: {run.where}")
        except BaseException as error:
            self.__exit__(type(error))
            raise

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Write what is left and end what was started; W&B learns whether the run was cut short."""
        self._file.close()
        self._each(lambda other: other.close(failed=kind is not None))

    def log(self, record: dict[str, Any]) -> None:
        """Write one record; its `step` is the number of updates done."""
        self._file.write(json.dumps(record, allow_nan=False, sort_keys=True) + "\n")
        self._each(lambda other: other.log(record))

    def _each(self, tell: "Callable[[_Wandb | _TensorBoard], None]") -> None:
        for name, other in tuple(self._others.items()):
            try:
                tell(other)
            except (Exception, SystemExit) as error:  # W&B exits when its process has ended badly
                del self._others[name]
                with contextlib.suppress(Exception, SystemExit):
                    other.close(failed=True)
                self._emit("message", text=f"{name} failed and gets no more records, the run goes on: {explain(error)}")


class _TensorBoard:
    """One event file, written in the caller's thread: after an error of its own thread, SummaryWriter hangs at exit."""

    def __init__(self, folder: Path, records: list[dict[str, Any]]):
        from tensorboardX.event_file_writer import EventsWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        self._write(0, session_log={"status": "START"})  # so that what earlier files say is dropped
        for record in records:
            self.log(record)

    def _write(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event  # type: ignore[attr-defined]

        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))

    def log(self, record: dict[str, Any]) -> None:
        values = [{"tag": k, "simple_value": v} for k, v in record.items() if k != "step" and v is not None]
        self._write(record["step"], summary={"value": values})
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


class _Wandb:
    """A run at Weights & Biases, apart from any that the process has besides."""

    def __init__(self, config: Config, run_id: str):
        import wandb

        folder = Path(os.environ.get("WANDB_DIR") or cache_dir())
        folder.mkdir(parents=True, exist_ok=True)
        called = {"project": config.exp.project_name, "name": config.exp.run_name or None, "id": run_id}
        options: dict[str, Any] = {**called, "resume": "allow", "reinit": "create_new", "dir": str(folder)}
        # What is not uploaded 30 s after the end lies in the run's folder, for `wandb sync`.
        settings = wandb.Settings(silent=True, console="off", finish_timeout=30.0)
        try:
            self._run = wandb.init(config=config.model_dump(), settings=settings, **options)
        except Exception as error:
            remedy = "run `wandb login`, set WANDB_MODE=offline, or leave out --exp.use_wandb"
            raise NanodlmError(f"W&B did not start ({explain(error)}): {remedy}") from error
        self.where = str(Path(self._run.dir).parent) if self._run.offline else self._run.url

    def log(self, record: dict[str, Any]) -> None:
        self._run.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    def close(self, failed: bool) -> None:
        import wandb

        try:
            self._run.finish(exit_code=int(failed))
        finally:
            if wandb.run is None:
                wandb.teardown()  # ends W&B's own process, which no other run of ours needs
