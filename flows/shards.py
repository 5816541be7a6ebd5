"""The shards as tasks of their own, in threads, processes, or on the workers of a Dask cluster."""

import os
from typing import Any

from prefect import flow, tags, task, unmapped
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import as_completed
from prefect.logging import get_run_logger
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from nanodlm.config import Config
from nanodlm.errors import NanodlmError, Stopped, Unreachable, UsageError
from nanodlm.flows import TAG
from nanodlm.flows.internals import untagged
from nanodlm.flows.reporting import watcher
from nanodlm.stages import fanout
from nanodlm.stages.lookup import ready
from nanodlm.stages.process import end_with_parent
from nanodlm.store import Artifact, Store


def may_pass(_task: Any, _run: Any, state: State) -> bool:
    """Retry only what may pass by itself, such as a network that was away; never what the user has to mend."""
    return isinstance(state.result(raise_on_failure=False), OSError | Unreachable)


RETRIED: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False, "retry_condition_fn": may_pass}


@task(task_run_name="shard-{index}", retries=3, retry_delay_seconds=[2, 4, 8], retry_jitter_factor=0.5, **RETRIED)
def build_shard(index: int, config: Config, store_url: str, inputs: dict[str, str]) -> bool:
    """Make one shard as a finished part of an attempt of its own, and return whether it had to be made."""
    return fanout.build_shard(config, Store(store_url), index, inputs)


@flow(name="shards", flow_run_name="{store_url}", persist_result=False)
def build_shards(missing: list[int], config: Config, store_url: str, inputs: dict[str, str]) -> int:
    """Make shards as tasks, and return how many were made. A task in another process gets this flow along."""
    shown, built, failed = watcher(), 0, 0
    with shown.showing("shard"), untagged():
        for future in as_completed(build_shard.map(missing, unmapped(config), store_url, unmapped(inputs))):
            try:
                built += future.result()
            except Stopped:
                raise
            except Exception as error:  # also what a process that was killed leaves behind
                failed += 1
                get_run_logger().warning("a shard is left to the shard stage: %s", error)
            shown.emit("progress", done=built, total=len(missing), unit="shards")
        if failed:
            shown.emit("message", text=f"{failed} of {len(missing)} shards are left to the stage itself")
    return built


def shard_in_parallel(config: Config, store_url: str, inputs: dict[str, Artifact]) -> None:
    """Make the missing shards as tasks, when there are several; the stage then adopts them, and makes what failed."""
    store = Store(store_url)
    lookup = ready("shard", config, store, inputs=inputs)
    with fanout.missing_shards(lookup, store, watcher().emit) as missing:
        if len(missing) < 2:
            return
        make = build_shards.with_options(task_runner=task_runner())
        try:
            with tags(TAG):  # with an absolute path, for other machines
                make(missing, config, store.uri(), lookup.input_fingerprints)
        except OSError as error:
            said = f"the workers that make shards cannot be reached: {' '.join(str(error).split())[:200]}"
            raise NanodlmError(f"{said}; check NANODLM_DASK_ADDRESS, or use --runner threads") from error


def task_runner() -> TaskRunner[Any]:
    """Return what runs the tasks that make shards: of `$NANODLM_RUNNER` (threads) and `$NANODLM_WORKERS` (cores).

    `dask` uses the cluster at `$NANODLM_DASK_ADDRESS`, with its own number of workers, else starts one on this machine.
    """
    name = os.environ.get("NANODLM_RUNNER") or "threads"
    if name not in ("threads", "processes", "dask"):
        raise UsageError(f"unknown runner {name!r}: choose one of threads, processes, dask (--runner, NANODLM_RUNNER)")
    count = os.environ.get("NANODLM_WORKERS") or str(os.cpu_count() or 1)
    if not count.isdecimal() or int(count) < 1:
        raise UsageError(f"--workers (or NANODLM_WORKERS) counts tasks at a time, from 1, not {count}")
    if name == "threads":
        return ThreadPoolTaskRunner(max_workers=int(count))
    if name == "processes":
        # Else they would wait for ever where this process is killed.
        return ProcessPoolTaskRunner(max_workers=int(count), initializer=end_with_parent, initargs=(os.getpid(),))
    os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "error")  # read when it is imported, here and in its workers
    try:
        from prefect_dask.task_runners import DaskTaskRunner
    except ImportError as error:
        raise UsageError("the runner dask is not installed: pip install '.[dask]'") from error
    if address := os.environ.get("NANODLM_DASK_ADDRESS"):
        return DaskTaskRunner(address=address)
    # Loopback only, and no page that others could see.
    local = {"n_workers": int(count), "threads_per_worker": 1, "host": "127.0.0.1", "dashboard_address": None}
    return DaskTaskRunner(cluster_kwargs=local)
