"""The pipeline flow: one task per stage. A stage that the store already holds ends as `Cached`.

nanodlm run                              # on a server of its own
python -m flows.pipeline                 # on the server that PREFECT_API_URL names
"""

import time
from contextvars import ContextVar
from typing import Any, Literal, Protocol

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.settings import get_current_settings
from prefect.states import Completed

from flows.sharding import shard_in_parallel, task_runner, worth_retrying
from nanodlm import launch, stages
from nanodlm.config import PRESETS, Config
from nanodlm.errors import NanodlmError
from nanodlm.store import Artifact, Store

StageName = Literal["download", "tokenizer", "split", "shard", "train", "evaluate", "sample"]
LOG_SECONDS = 30.0  # between progress lines in Prefect's log


class Watcher(Protocol):
    """Whoever shows the stages to a person; `nanodlm.console.Console` is one."""

    def start(self, stage: str) -> None: ...
    def emit(self, kind: str, **fields: Any) -> None: ...
    def end(self) -> None: ...
    def done(self, artifact: Artifact, record: dict[str, Any]) -> None: ...


class _Log:
    """Watches through Prefect's log, a line at most every 30 s."""

    def __init__(self) -> None:
        self._logger, self._last = get_run_logger(), 0.0

    def start(self, stage: str) -> None:
        self._logger.info("%s: building", stage)

    def emit(self, kind: str, **fields: Any) -> None:
        if kind == "message":
            self._logger.info(fields["text"])
        elif kind == "progress" and time.monotonic() - self._last >= LOG_SECONDS:
            self._last = time.monotonic()
            shown = {k: v for k, v in fields.items() if k in ("done", "total", "unit", "loss", "tokens_per_second")}
            self._logger.info("%s", shown)

    def end(self) -> None:
        """Leave the log as it is: there is no bar to take away."""

    def done(self, artifact: Artifact, record: dict[str, Any]) -> None:
        self._logger.info("%(stage)s: %(status)s in %(seconds)s s, %(uri)s", record)


WATCHER: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@task(
    task_run_name="{name}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=2,
    retry_delay_seconds=[5, 30],
    retry_condition_fn=worth_retrying,
)
def run_stage(name: str, config: Config, store_url: str, rebuild: bool) -> Any:
    """Build one stage, in a process of its own if it uses JAX; or find it, and end as `Cached`."""
    store = Store(store_url)
    watcher = WATCHER.get() or _Log()
    started = time.monotonic()
    lookup, _ = stages.ready(name, config, store, rebuild=rebuild)
    if lookup.artifact and not rebuild:
        record = stages.record(lookup.artifact, "cached", time.monotonic() - started)
        watcher.done(lookup.artifact, record)
        return Completed(name="Cached", data=record)
    watcher.start(name)
    try:
        if lookup.stage.own_process:
            launch.run_stage(name, config, store_url, rebuild=rebuild, emit=watcher.emit)
            assert lookup.fingerprint is not None
            artifact = store.find(name, lookup.fingerprint)
            if artifact is None:
                raise NanodlmError(f"the {name} process ended without an artifact: run again to continue")
            record = stages.record(artifact, "built", time.monotonic() - started)
        else:
            artifact, record = stages.run(name, config, store, rebuild=rebuild, emit=watcher.emit)
    finally:
        watcher.end()
    watcher.done(artifact, record)
    return record


def _run_name() -> str:
    parameters = flow_run.parameters
    config = parameters["config"]
    preset = next((name for name, preset in PRESETS.items() if preset == config), "custom")
    return f"{preset}-until-{parameters['until']}"


@flow(name="pipeline", flow_run_name=_run_name, persist_result=False, task_runner=task_runner())
def pipeline(
    config: Config = PRESETS["demo"],
    store: str = "data/store",
    until: StageName = "sample",
    rebuild: StageName | None = None,
) -> list[dict[str, Any]]:
    """Text to samples: build what the store lacks, stage by stage, and the report at the end.

    Args:
        config: Every setting of the run.
        store: Where artifacts lie: a folder or an fsspec URL.
        until: The last stage to run.
        rebuild: A stage to build even though the store holds it.

    Returns:
        For each stage `stage`, `status` (built or cached), `uri`, `fingerprint` and `seconds`.
    """
    records = []
    for name in stages.until(until):
        if name == "shard" and rebuild != "shard":
            _shard_in_parallel(config, store)
        state = run_stage(name, config, store, name == rebuild, return_state=True)
        records.append(state.result())
    return records


def _shard_in_parallel(config: Config, store: str) -> None:
    watcher = WATCHER.get() or _Log()
    watcher.start("shard")
    try:
        shard_in_parallel(config, store, watcher.emit)
    finally:
        watcher.end()


def run_pipeline(
    config: Config,
    store: str,
    until: str,
    rebuild: str | None,
    watcher: Watcher,
    verbose: bool,
    runner: str | None = None,
    workers: int | None = None,
) -> list[dict[str, Any]]:
    """Run the flow in this process, on the server that the settings name or else on one started for it."""
    from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_LEVEL, temporary_settings

    from flows.server import ephemeral_server

    flow_ = pipeline.with_options(task_runner=task_runner(runner, workers))

    def run() -> list[dict[str, Any]]:
        token = WATCHER.set(watcher)
        try:
            with temporary_settings({PREFECT_LOGGING_LEVEL: "INFO" if verbose else "CRITICAL"}):
                return flow_(config, store, until, rebuild)  # type: ignore[arg-type]
        finally:
            WATCHER.reset(token)

    if get_current_settings().api.url:
        return run()
    with ephemeral_server() as url, temporary_settings({PREFECT_API_URL: url}):
        return run()


if __name__ == "__main__":
    pipeline()
