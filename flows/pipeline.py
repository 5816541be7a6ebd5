"""The pipeline as Prefect flows, whole or in parts: one task per stage. What the store holds ends as `Cached`.

nanodlm run                              # on a server of its own
python -m flows.pipeline                 # on the server that PREFECT_API_URL names
prefect deployment run pipeline/demo     # on a worker, once `prefect deploy --all` was run; see docs/operations.md
"""

import os
import signal
import time
from collections.abc import Collection
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any, Literal

from prefect import flow, tags, task
from prefect.cache_policies import NO_CACHE
from prefect.context import TaskRunContext
from prefect.exceptions import TerminationSignal
from prefect.runtime import flow_run
from prefect.settings import get_current_settings
from prefect.states import Completed
from prefect.utilities.annotations import quote

from flows.automations import TAG, answering_server, untagged
from flows.limits import place
from flows.reporting import Pages, Watcher
from flows.server import heard
from flows.shards import shard_in_parallel, task_runner, worth_retrying
from nanodlm.cluster.follow import run_on_cluster
from nanodlm.cluster.settings import Launch
from nanodlm.config import PRESETS, Config, StoreUrl
from nanodlm.errors import NanodlmError, Stopped, UsageError
from nanodlm.stages import run as stages_run
from nanodlm.stages import table
from nanodlm.stages.lookup import ready
from nanodlm.stages.process import run_in_process
from nanodlm.stages.run import default_store
from nanodlm.stages.table import STAGES, check_rebuild
from nanodlm.store import Artifact, Store, fingerprint_of

StageName = Literal["download", "tokenizer", "split", "shard", "train", "evaluate", "sample"]
DataStageName = Literal["download", "tokenizer", "split", "shard"]
HERE = Launch()
WATCHER: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@task(
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=2,
    retry_delay_seconds=[5, 30],
    retry_condition_fn=worth_retrying,
)
def run_stage(
    name: str,
    config: Config,
    store_url: str,
    inputs: dict[str, Artifact],
    *,
    build: bool = True,
    rebuild: bool = False,
    gpu_limit: str | None = None,
    on: Launch | None = None,
) -> Any:
    """Build one stage, in a process of its own if it uses JAX; or find it, and end as `Cached`.

    Args:
        name: One of `nanodlm.stages.table.STAGES`.
        config: The run's configuration.
        store_url: Where artifacts lie.
        inputs: The artifacts it reads.
        build: Whether to build it when the store lacks it, or to fail.
        rebuild: Whether to build it even though the store holds it.
        gpu_limit: Name of a concurrency limit to hold while a stage that uses JAX is built.
        on: The cluster that trains; by default a process of this machine does.

    Returns:
        The artifact, and its record as `nanodlm.stages.run.run_stage` gives it.
    """
    if context := TaskRunContext.get():
        context.task_run.tags = [name]  # not from its start: see `untagged`
    store, watcher, started = Store(store_url), WATCHER.get() or Pages(), time.monotonic()
    lookup = ready(name, config, store, rebuild=rebuild, inputs=inputs)
    if lookup.artifact and not rebuild:
        record = stages_run.record(lookup.artifact, "cached", time.monotonic() - started)
        watcher.done(lookup.artifact, record)
        return Completed(name="Cached", data=(lookup.artifact, record))
    if not build:
        raise NanodlmError(
            f"{name} is not built for this configuration in {store.uri()}: run the pipeline, or `nanodlm run --until "
            f"{name}`, with the same settings first"
        )
    watcher.start(name)
    held = place(gpu_limit, watcher.emit) if gpu_limit and lookup.stage.own_process else nullcontext()
    try:
        with held, heard(watcher.emit):  # in this order: a server that is away is given back no place
            if lookup.stage.own_process:
                if on and on.target != "process" and name == "train":
                    artifact = run_on_cluster(lookup, config, store, on, rebuild=rebuild, emit=watcher.emit)
                else:
                    told = lookup.input_fingerprints
                    run_in_process(name, config, store_url, inputs=told, rebuild=rebuild, emit=watcher.emit)
                    artifact = store.open(f"{name}/{lookup.fingerprint}")
                record = stages_run.record(artifact, "built", time.monotonic() - started)
            else:
                artifact, record = stages_run.run_stage(
                    name, config, store, rebuild=rebuild, inputs=inputs, emit=watcher.emit
                )
    except Stopped as stopped:
        if isinstance(stopped.__cause__, TerminationSignal):  # Prefect tells a cancellation from a crash by it
            raise stopped.__cause__ from None
        raise
    finally:
        watcher.end()
    watcher.done(artifact, record)
    return artifact, record


def _run_name() -> str:
    """The preset and the start of a fingerprint of all settings, such as `demo-1f2e3d4c`."""
    config = Config.model_validate(flow_run.parameters["config"])
    preset = next((name for name, preset in PRESETS.items() if preset == config), "custom")
    return f"{preset}-{fingerprint_of(config.model_dump(mode='json'))[:8]}"


def _run(
    names: Collection[str],
    config: Config,
    store: str | None,
    build: Collection[str],
    rebuild: str | None = None,
    gpu_limit: str | None = None,
    on: Launch | None = None,
) -> list[dict[str, Any]]:
    """Go through stages in order; those not to be built must be there."""
    found: dict[str, Artifact] = {}
    records = []
    url = store or default_store()
    if url.startswith("memory:"):
        raise UsageError("a store in memory is seen by no other process: give store a folder or a bucket")
    for name in names:
        inputs = {needed: found[needed] for needed in STAGES[name].inputs(config)}
        if name == "shard" and name in build and name != rebuild:
            _shard_in_parallel(config, url, inputs)
        run = run_stage.with_options(name=name, task_run_name=name)
        with untagged():
            state = run(
                name,
                config,
                url,
                quote(inputs),  # type: ignore[arg-type]
                build=name in build,
                rebuild=name == rebuild,
                gpu_limit=gpu_limit,
                on=on,
                return_state=True,
            )
        found[name], record = state.result()
        records.append(record)
    return records


def _shard_in_parallel(config: Config, store_url: str, inputs: dict[str, Artifact]) -> None:
    """Make missing shards as tasks of their own; the shard stage then adopts them."""
    lookup = ready("shard", config, Store(store_url), inputs=inputs)
    if lookup.artifact:
        return
    watcher = WATCHER.get() or Pages()
    watcher.start("shard")
    try:
        shard_in_parallel(config, store_url, lookup, watcher.emit)
    finally:
        watcher.end()


def _alone(
    name: str, config: Config, store: str | None, rebuild: bool, gpu_limit: str | None, on: Launch | None = None
) -> list[dict[str, Any]]:
    """One stage, after a look at all it is made from."""
    needed = {name}
    for earlier in reversed(table.until(name)):
        if earlier in needed:
            needed |= set(STAGES[earlier].inputs(config))
    names = [earlier for earlier in table.until(name) if earlier in needed]
    return _run(names, config, store, (name,), name if rebuild else None, gpu_limit, on)


@flow(flow_run_name=_run_name, persist_result=False)
def pipeline(
    config: Config = PRESETS["demo"],
    store: StoreUrl | None = None,
    until: StageName = "sample",
    rebuild: StageName | None = None,
    gpu_limit: str | None = None,
    train_on: Launch = HERE,
) -> list[dict[str, Any]]:
    """Text to samples: build what the store lacks, stage by stage, and the report at the end.

    Args:
        config: Every setting of the run.
        store: Where artifacts lie: a folder, or an address such as s3://bucket/prefix, without credentials, which come
            from the worker's environment. Without it that of the worker's NANODLM_STORE, else data/store.
        until: The last stage to run.
        rebuild: A stage to build even though the store holds it.
        gpu_limit: Name of the concurrency limit to hold while a stage trains, evaluates or samples; it must exist.
        train_on: Where to train: in a process of the worker, or as a job of a Slurm or Kubernetes cluster.

    Returns:
        For each stage `stage`, `status` (built or cached), `uri`, `fingerprint` and `seconds`.
    """
    check_rebuild(rebuild, until)
    return _run(table.until(until), config, store, STAGES, rebuild, gpu_limit, train_on)


@flow(flow_run_name=_run_name, persist_result=False)
def prepare(
    config: Config = PRESETS["demo"], store: StoreUrl | None = None, rebuild: DataStageName | None = None
) -> list[dict[str, Any]]:
    """The stages up to the shards, which need no accelerator.

    Args:
        config: Every setting of the run.
        store: As in `pipeline`.
        rebuild: A stage to build even though the store holds it.

    Returns:
        As `pipeline` does.
    """
    return _run(table.until("shard"), config, store, STAGES, rebuild)


@flow(flow_run_name=_run_name, persist_result=False)
def train(
    config: Config = PRESETS["demo"],
    store: StoreUrl | None = None,
    rebuild: bool = False,
    gpu_limit: str | None = None,
    train_on: Launch = HERE,
) -> list[dict[str, Any]]:
    """The train stage alone: it goes on from its last checkpoint. The shards must be there.

    Args:
        config: Every setting of the run.
        store: As in `pipeline`.
        rebuild: Train even though the store holds the result.
        gpu_limit: As in `pipeline`.
        train_on: As in `pipeline`.

    Returns:
        As `pipeline` does.
    """
    return _alone("train", config, store, rebuild, gpu_limit, train_on)


@flow(flow_run_name=_run_name, persist_result=False)
def evaluate(
    config: Config = PRESETS["demo"],
    store: StoreUrl | None = None,
    rebuild: bool = False,
    gpu_limit: str | None = None,
) -> list[dict[str, Any]]:
    """The evaluate stage alone. The trained model must be there.

    Args:
        config: Every setting of the run.
        store: As in `pipeline`.
        rebuild: Evaluate even though the store holds the result.
        gpu_limit: As in `pipeline`.

    Returns:
        As `pipeline` does.
    """
    return _alone("evaluate", config, store, rebuild, gpu_limit)


@flow(flow_run_name=_run_name, persist_result=False)
def sample(
    config: Config = PRESETS["demo"],
    store: StoreUrl | None = None,
    rebuild: bool = False,
    gpu_limit: str | None = None,
) -> list[dict[str, Any]]:
    """The sample stage alone. The trained model must be there.

    Args:
        config: Every setting of the run.
        store: As in `pipeline`.
        rebuild: Sample even though the store holds the result.
        gpu_limit: As in `pipeline`.

    Returns:
        As `pipeline` does.
    """
    return _alone("sample", config, store, rebuild, gpu_limit)


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
    """Run the flow in this process, on the server that the settings name or else on one started for it.

    Raises:
        Stopped: On SIGTERM, after a training has saved.
    """
    from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_LEVEL, temporary_settings

    from flows.server import ephemeral_server

    task_runner(runner, workers)  # refuses what cannot be before a server is started
    os.environ.update({name: str(v) for name, v in (("NANODLM_RUNNER", runner), ("NANODLM_WORKERS", workers)) if v})

    def stop(*_: Any) -> None:
        raise Stopped("stopped by a signal; finished stages, parts and checkpoints are kept: run again to continue")

    def run() -> list[dict[str, Any]]:
        token, handler = WATCHER.set(watcher), signal.signal(signal.SIGTERM, stop)
        try:
            with temporary_settings({PREFECT_LOGGING_LEVEL: "INFO" if verbose else "CRITICAL"}), tags(TAG):
                return pipeline(config, store, until, rebuild)  # type: ignore[arg-type]
        finally:
            WATCHER.reset(token)
            signal.signal(signal.SIGTERM, handler)

    if get_current_settings().api.url:
        with answering_server():
            pass
        return run()
    with ephemeral_server() as url, temporary_settings({PREFECT_API_URL: url}):
        return run()


if __name__ == "__main__":
    with tags(TAG):
        pipeline()
