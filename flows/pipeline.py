"""The pipeline as Prefect flows, whole or in parts: one task per stage. What the store holds ends as `Cached`.

nanodlm run                              # on a server of its own
python -m flows.pipeline                 # on the server that PREFECT_API_URL names
prefect deployment run pipeline/demo     # on a worker, once `prefect deploy --all` was run; see docs/operations.md
"""

import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal, cast

from prefect import Flow, flow, tags, task
from prefect.cache_policies import NO_CACHE
from prefect.concurrency.sync import concurrency
from prefect.context import TagsContext
from prefect.exceptions import TerminationSignal
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_LEVEL, get_current_settings, temporary_settings
from prefect.states import Completed
from prefect.utilities.annotations import quote

from flows import TAG
from flows.reporting import WATCHER, Pages, Watcher
from flows.server import check_server, ephemeral_server, wait_for_server_at_end
from flows.shards import shard_in_parallel, task_runner, worth_retrying
from nanodlm.cluster.follow import run_on_cluster
from nanodlm.cluster.settings import Launch
from nanodlm.config import PRESETS, Config, StoreUrl
from nanodlm.errors import NanodlmError, Stopped, UsageError
from nanodlm.stages import table
from nanodlm.stages.lookup import ready
from nanodlm.stages.process import run_in_process
from nanodlm.stages.run import default_store, record, run_stage
from nanodlm.stages.table import STAGES, StageName, check_rebuild
from nanodlm.store import Artifact, Store, fingerprint_of

DataStageName = Literal["download", "tokenizer", "split", "shard"]
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
    rebuild: str | None,
    gpu_limit: str | None = None,
    train_on: Launch = HERE,
) -> Any:
    """Build one stage, in a process of its own if it uses JAX; or find it, and end as `Cached`.

    Where `build` is false and the store lacks the stage, it fails. A stage that uses JAX holds a slot of `gpu_limit`
    while it is built. What returns is the artifact, and its record as `nanodlm.stages.run.run_stage` gives it.
    """
    store, watcher, started = Store(store_url), WATCHER.get() or Pages(), time.monotonic()
    lookup = ready(name, config, store, rebuild=rebuild == name, inputs=inputs)
    again = lookup.is_again(rebuild)
    if lookup.artifact and not again:
        found = record(lookup.artifact, "cached", time.monotonic() - started)
        watcher.done(lookup.artifact, found)
        return Completed(name="Cached", data=(lookup.artifact, found))
    if not build:
        remedy = f"run the pipeline, or `nanodlm run --until {name}`, with the same settings first"
        raise NanodlmError(f"{name} is not built for this configuration in {store.uri()}: {remedy}")
    own_process = lookup.stage.own_process
    limits = [gpu_limit] if gpu_limit and own_process else []
    if limits:
        watcher.emit("message", text=f"waiting for a slot of the concurrency limit {gpu_limit}")
    slot = concurrency(limits, lease_duration=LEASE_SECONDS, strict=False, raise_on_lease_renewal_failure=False)
    try:
        # In this order: a slot goes back to a server that answers.
        with slot, wait_for_server_at_end(watcher.emit), watcher.showing(name):
            if not own_process:
                artifact, found = run_stage(name, config, store, rebuild=again, inputs=inputs, emit=watcher.emit)
            else:
                if name == "train" and train_on.target != "process":
                    artifact = run_on_cluster(lookup, config, store, train_on, rebuild=again, emit=watcher.emit)
                else:
                    artifact = run_in_process(lookup, config, store, rebuild=again, emit=watcher.emit)
                found = record(artifact, "built", time.monotonic() - started)
    except Stopped as stopped:
        if isinstance(stopped.__cause__, TerminationSignal):  # Prefect tells a cancellation from a crash by it
            raise stopped.__cause__ from None
        raise
    watcher.done(artifact, found)
    return artifact, found


def _run_name() -> str:
    """Return the preset and the start of a fingerprint of all settings, such as `demo-1f2e3d4c`."""
    config = Config.model_validate(flow_run.parameters["config"])
    preset = next((name for name, preset in PRESETS.items() if preset == config), "custom")
    return f"{preset}-{fingerprint_of(config.model_dump(mode='json'))[:8]}"


def _run(
    config: Config, store: str | None, until: str, rebuild: str | None, *, alone: bool = False, **options: Any
) -> list[dict[str, Any]]:
    """Go through stages in order; `alone`, all that the last one needs must be there. Return the record of each."""
    found: dict[str, Artifact] = {}
    records, url, needed = [], store or default_store(), {until}
    if url.startswith("memory:"):
        raise UsageError("a store in memory is seen by no other process: give store a folder or a bucket")
    told = [until] if alone else [*table.until(until)]
    table.check(config, told if options.get("train_on", HERE) == HERE else [name for name in told if name != "train"])
    for name in reversed(table.until(until)):
        if name in needed:
            needed |= set(STAGES[name].inputs(config))
    for name in table.until(until):
        if alone and name not in needed:
            continue
        inputs = {input_: found[input_] for input_ in STAGES[name].inputs(config)}
        if name == "shard" and rebuild not in (name, "changed") and not alone:
            shard_in_parallel(config, url, inputs, WATCHER.get() or Pages())
        with TagsContext(current_tags=set()):  # of a tag, Prefect would ask a server that may be busy for a limit
            make = stage_task.with_options(name=name, task_run_name=name)
            build, given = not alone or name == until, cast(dict[str, Artifact], quote(inputs))
            state = make(name, config, url, given, build=build, rebuild=rebuild, return_state=True, **options)
        found[name], told = state.result()
        records.append(told)
    return records


PARAMETERS = """
    Args:
        config: Every setting of the run.
        store: Where artifacts lie: a folder, or an address such as s3://bucket/prefix, without credentials, which come
            from the worker's environment. Without it that of the worker's NANODLM_STORE, else data/store.
        until: The last stage to run.
        rebuild: What to build even though the store holds it.
        gpu_limit: A concurrency limit to hold a slot of while a stage uses the accelerator, where the server has it.
        train_on: Where to train: in a process of the worker, or as a job of a Slurm or Kubernetes cluster.
"""


def described_flow(function: Callable[..., list[dict[str, Any]]]) -> Flow[..., list[dict[str, Any]]]:
    """Make a flow, whose docstring has `PARAMETERS`, from which Prefect takes what its forms say."""
    function.__doc__ = f"{function.__doc__}\n{PARAMETERS}"
    return flow(flow_run_name=_run_name, persist_result=False)(function)


@described_flow
def pipeline(
    config: Config = PRESETS["demo"],
    store: StoreUrl | None = None,
    until: StageName = "sample",
    rebuild: StageName | Literal["changed"] | None = None,
    gpu_limit: str | None = None,
    train_on: Launch = HERE,
) -> list[dict[str, Any]]:
    """Go from text to samples: build what the store lacks, stage by stage, and the report at the end."""
    check_rebuild(rebuild, until)
    return _run(config, store, until, rebuild, gpu_limit=gpu_limit, train_on=train_on)


@described_flow
def prepare(
    config: Config = PRESETS["demo"], store: StoreUrl | None = None, rebuild: DataStageName | None = None
) -> list[dict[str, Any]]:
    """Prepare the data, up to the shards. It needs no accelerator."""
    return _run(config, store, "shard", rebuild)


@described_flow
def train(
    config: Config = PRESETS["demo"],
    store: StoreUrl | None = None,
    rebuild: bool = False,
    gpu_limit: str | None = None,
    train_on: Launch = HERE,
) -> list[dict[str, Any]]:
    """Train, and nothing else: from the last checkpoint on, if there is one. The shards must be in the store."""
    again = "train" if rebuild else None
    return _run(config, store, "train", again, alone=True, gpu_limit=gpu_limit, train_on=train_on)


@described_flow
def evaluate(
    config: Config = PRESETS["demo"], store: StoreUrl | None = None, rebuild: bool = False, gpu_limit: str | None = None
) -> list[dict[str, Any]]:
    """Evaluate, and nothing else. The trained model must be in the store."""
    return _run(config, store, "evaluate", "evaluate" if rebuild else None, alone=True, gpu_limit=gpu_limit)


@described_flow
def sample(
    config: Config = PRESETS["demo"], store: StoreUrl | None = None, rebuild: bool = False, gpu_limit: str | None = None
) -> list[dict[str, Any]]:
    """Draw samples, and nothing else. The trained model must be in the store."""
    return _run(config, store, "sample", "sample" if rebuild else None, alone=True, gpu_limit=gpu_limit)


def run_pipeline(
    config: Config, store: str, until: str, rebuild: str | None, watcher: Watcher, verbose: bool
) -> list[dict[str, Any]]:
    """Run the flow `pipeline` in this process, on the server that the settings name, else on one started for it.

    SIGTERM raises `Stopped`, after a training has saved.
    """
    task_runner()  # refuses what cannot be before a server is started

    def stop(*_: Any) -> None:
        raise Stopped("stopped by a signal; finished stages, parts and checkpoints are kept: run again to continue")

    with ExitStack() as stack:
        if get_current_settings().api.url:
            check_server()
        else:
            stack.enter_context(temporary_settings({PREFECT_API_URL: stack.enter_context(ephemeral_server())}))
        stack.enter_context(temporary_settings({PREFECT_LOGGING_LEVEL: "INFO" if verbose else "CRITICAL"}))
        stack.enter_context(tags(TAG))
        stack.callback(WATCHER.reset, WATCHER.set(watcher))
        stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, stop))
        return pipeline(config, store, until, rebuild)  # type: ignore[arg-type]


if __name__ == "__main__":
    with tags(TAG):
        pipeline()
