"""One stage of the pipeline as a Prefect task: found, or built while it holds the device it needs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.concurrency.sync import concurrency
from prefect.exceptions import TerminationSignal
from prefect.states import Completed

from flows.reporting import Watcher, current_watcher
from flows.server import wait_for_server_at_end
from flows.shards import worth_retrying
from nanodlm.cluster.follow import run_on_cluster
from nanodlm.cluster.settings import Launch
from nanodlm.config import Config
from nanodlm.errors import NanodlmError, Stopped
from nanodlm.stages.lookup import ready
from nanodlm.stages.process import run_in_process
from nanodlm.stages.run import record, run_stage
from nanodlm.store import Artifact, Store

HERE = Launch()  # in a process of this machine
LEASE_SECONDS = 900.0  # for which a slot stays taken after kill -9; the server may be away for a quarter of it


@task(
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=2,
    retry_delay_seconds=[5, 30],
    retry_condition_fn=worth_retrying,
)
def stage_task(
    name: str,
    config: Config,
    store_url: str,
    inputs: dict[str, Artifact],
    *,
    build: bool,
    rebuild: bool,
    gpu_limit: str | None = None,
    train_on: Launch = HERE,
) -> Any:
    """Build one stage, in a process of its own if it uses JAX; or find it, and end as `Cached`.

    Args:
        name: One of `nanodlm.stages.table.STAGES`.
        config: The run's configuration.
        store_url: Where artifacts lie.
        inputs: The artifacts it reads.
        build: Whether to build it when the store lacks it, or to fail.
        rebuild: Whether to build it even though the store holds it.
        gpu_limit: Name of a concurrency limit to hold a slot of while a stage that uses JAX is built.
        train_on: The cluster that trains; by default a process of this machine does.

    Returns:
        The artifact, and its record as `nanodlm.stages.run.run_stage` gives it.
    """
    store, watcher, started = Store(store_url), current_watcher(), time.monotonic()
    lookup, _ = ready(name, config, store, rebuild=rebuild, inputs=inputs)
    if lookup.artifact and not rebuild:
        found = record(lookup.artifact, "cached", time.monotonic() - started)
        watcher.done(lookup.artifact, found)
        return Completed(name="Cached", data=(lookup.artifact, found))
    if not build:
        raise NanodlmError(
            f"{name} is not built for this configuration in {store.uri()}: run the pipeline, or `nanodlm run --until "
            f"{name}`, with the same settings first"
        )
    own_process = lookup.stage.own_process
    try:
        # In this order: the slot is given back when the server answers again.
        with _slot(gpu_limit if own_process else None, watcher), wait_for_server_at_end(watcher.emit):
            watcher.start(name)
            if own_process:
                if name == "train" and train_on.target != "process":
                    run_on_cluster(name, config, store_url, train_on, rebuild=rebuild, emit=watcher.emit)
                else:
                    run_in_process(name, config, store_url, rebuild=rebuild, emit=watcher.emit)
                artifact = store.find(name, str(lookup.fingerprint))
                if artifact is None:
                    raise NanodlmError(f"the {name} process ended without an artifact: run again to continue")
                found = record(artifact, "built", time.monotonic() - started)
            else:
                artifact, found = run_stage(name, config, store, rebuild=rebuild, inputs=inputs, emit=watcher.emit)
    except Stopped as stopped:
        if isinstance(stopped.__cause__, TerminationSignal):  # Prefect tells a cancellation from a crash by it
            raise stopped.__cause__ from None
        raise
    finally:
        watcher.end()
    watcher.done(artifact, found)
    return artifact, found


@contextmanager
def _slot(limit: str | None, watcher: Watcher) -> Iterator[None]:
    """Hold a slot of a concurrency limit, once there is one; hold nothing where the server has no such limit."""
    if limit is None:
        yield
        return
    watcher.emit("message", text=f"waiting for a slot of the concurrency limit {limit}")
    with concurrency(limit, lease_duration=LEASE_SECONDS, strict=False, raise_on_lease_renewal_failure=False):
        yield
