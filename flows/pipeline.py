"""The pipeline as Prefect flows, whole or in parts: one task per stage. What the store holds ends as `Cached`.

`nanodlm run` and deployments run them; see docs/operations.md.
"""

import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal, cast

from prefect import Flow, State, flow, tags, task
from prefect.cache_policies import NO_CACHE
from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings
from prefect.states import Completed, Failed
from prefect.utilities.annotations import quote

from nanodlm.cluster.follow import run_on_cluster
from nanodlm.cluster.settings import Launch
from nanodlm.config import Changes, Config, Preset, StoreUrl, as_changes, changed
from nanodlm.errors import NanodlmError, Stopped, Unreachable, UsageError
from nanodlm.flows import TAG
from nanodlm.flows.internals import untagged
from nanodlm.flows.own_run import built_before, fail, hold_device, working_for_run
from nanodlm.flows.reporting import WATCHER, RunLog, show_run
from nanodlm.flows.server import check_server
from nanodlm.precision import measured
from nanodlm.stages import table
from nanodlm.stages.lookup import named_judge, read_by, ready
from nanodlm.stages.process import run_in_process
from nanodlm.stages.progress import Watcher
from nanodlm.stages.run import default_store, enter_folder, record, run_stage
from nanodlm.stages.table import STAGES, StageName, check_rebuild
from nanodlm.store import Artifact, Store

DataStageName = Literal["download", "tokenizer", "split", "shard"]
Records = list[dict[str, Any]]  # of each stage, as `nanodlm.stages.run.record` gives it
Inputs = dict[str, Artifact]
Outcome = Records | State[Any]
HERE = Launch()  # in a process of this machine
NONE: dict[str, Any] = {}  # a preset without changes
Where = StoreUrl | None
Limit = str | None


def may_pass(_task: Any, _run: Any, state: State) -> bool:
    """Retry only what may pass by itself, such as a network that was away; never what the user has to mend."""
    return isinstance(state.result(raise_on_failure=False), OSError | Unreachable)


@task(retries=2, retry_delay_seconds=[5, 30], retry_condition_fn=may_pass, cache_policy=NO_CACHE, persist_result=False)
def stage_task(
    name: str, config: Config, store_url: str, inputs: Inputs, build: bool, rebuild: str | None, **options: Any
) -> Any:
    """Build one stage, or find it and end as `Cached`; return the artifact and its record. Not to `build` it may fail.

    If it uses JAX, it is built in a process of its own, which holds a slot of the option `gpu_limit`, or where the
    option `train_on` says. What a user has to mend ends as `Failed`, without an error's tracebacks.
    """
    try:
        store, shown, started = Store(store_url), WATCHER.get() or RunLog(), time.monotonic()
        lookup = ready(name, config, store, rebuild=rebuild == name, inputs=inputs)
        again, own_process = lookup.is_again(rebuild), lookup.stage.own_process
        if lookup.note:
            shown.emit("message", text=lookup.note)
        if lookup.artifact and not again:
            found = record(lookup.artifact, "cached", time.monotonic() - started, name)
            shown.done(lookup.artifact, found)
            return Completed(name="Cached", data=(lookup.artifact, found))
        if not build:
            remedy = f"run the pipeline, or `nanodlm run --until {name}`, with the same settings first"
            raise NanodlmError(f"{name} is not built for this configuration in {store.uri()}: {remedy}")
        limit = options.get("gpu_limit") if own_process else None
        with hold_device(limit, shown.emit), shown.showing(name):
            started = time.monotonic()
            if not own_process:
                artifact, found = run_stage(name, config, store, rebuild=again, inputs=inputs, emit=shown.emit)
            else:
                launch = options.get("train_on", HERE)
                if lookup.stage.folder == "train" and launch.target != "process":
                    artifact = run_on_cluster(lookup, config, store, launch, rebuild=again, emit=shown.emit)
                else:
                    artifact = run_in_process(lookup, config, store, rebuild=again, emit=shown.emit)
                found = record(artifact, "built", time.monotonic() - started, name)
        shown.done(artifact, found)
        return artifact, found
    except Unreachable:  # which may pass
        raise
    except NanodlmError as error:
        if error.__cause__ and not isinstance(error.__cause__, Exception):  # Prefect's own signal, which it knows
            raise error.__cause__ from None
        return Failed(message=str(error), data=error)


def _run(
    preset: str, changes: dict[str, Any], store: str | None, until: str, rebuild: str | bool | None, **options: Any
) -> Outcome:
    """Go through stages as `_stages` does, for this flow run; what the user has to mend ends it as `Failed`."""
    again = until if rebuild is True else rebuild or None
    try:
        enter_folder()
        with working_for_run():
            again = None if again in built_before() else again
            return _stages(measured(changed(preset, changes)), store or default_store(), until, again, **options)
    except NanodlmError as error:
        return fail(error)


def _stages(
    config: Config, url: str, until: str, rebuild: str | None, *, alone: bool = False, **options: Any
) -> Records:
    """Go through stages in order; `alone`, all that the last one needs must be there. Return the record of each."""
    records, names = [], table.needed(config, until) if alone else table.until(until, config)
    check_rebuild(config, rebuild, until)
    if url.startswith("memory:"):
        raise UsageError("a store in memory is seen by no other process: give store a folder or a bucket")
    elsewhere = {"train", "twin"} if options.get("train_on", HERE) != HERE else set()
    table.check(config, {until} - elsewhere if alone else {*names} - elsewhere)
    found = named_judge(config, Store(url)) if "judge" in names else {}
    for name in names:
        inputs = read_by(STAGES[name], config, found)
        with untagged():
            make = stage_task.with_options(name=name, task_run_name=name)
            build, given = not alone or name == until, cast(Inputs, quote(inputs))
            state = make(name, config, url, given, build=build, rebuild=rebuild, return_state=True, **options)
        found[name], told = state.result()
        records.append(told)
    if WATCHER.get() is None:
        show_run(found)
    return records


PARAMETERS = """
    Args:
        preset: The settings to begin with.
        config: The settings that are changed, in groups, or with a dot: `{"train.lr": 0.001}`.
        store: Where artifacts lie: a folder, or an address such as s3://bucket/prefix, without credentials, which come
            from the worker's environment. Without it that of the worker's NANODLM_STORE, else data/store.
        until: The last stage to run.
        rebuild: What to build even though the store holds it; a run that is retried rebuilds what it has not yet.
        gpu_limit: A concurrency limit to hold a slot of while a stage uses the accelerator, where the server has it.
        train_on: Where to train: in a process of the worker, or as a job of a Slurm or Kubernetes cluster.
"""


def described_flow(function: Callable[..., Outcome]) -> Flow[..., Any]:
    """Make a flow, whose docstring has `PARAMETERS`, from which Prefect takes what its forms say."""
    function.__doc__ = f"{function.__doc__}\n{PARAMETERS}"
    return flow(persist_result=False)(function)


@described_flow
def pipeline(
    preset: Preset = "demo",
    config: Changes = NONE,
    store: Where = None,
    until: StageName = "sample",
    rebuild: StageName | Literal["changed"] | None = None,
    gpu_limit: Limit = None,
    train_on: Launch = HERE,
) -> Outcome:
    """Go from text to samples: build what the store lacks, stage by stage, and the report at the end."""
    return _run(preset, config, store, until, rebuild, gpu_limit=gpu_limit, train_on=train_on)


@described_flow
def prepare(
    preset: Preset = "demo", config: Changes = NONE, store: Where = None, rebuild: DataStageName | None = None
) -> Outcome:
    """Prepare the data, up to the shards. It needs no accelerator."""
    return _run(preset, config, store, "shard", rebuild)


@described_flow
def train(
    preset: Preset = "demo",
    config: Changes = NONE,
    store: Where = None,
    rebuild: bool = False,
    gpu_limit: Limit = None,
    train_on: Launch = HERE,
) -> Outcome:
    """Train, and nothing else: from the last checkpoint on, if there is one. The shards must be in the store."""
    return _run(preset, config, store, "train", rebuild, alone=True, gpu_limit=gpu_limit, train_on=train_on)


@described_flow
def evaluate(
    preset: Preset = "demo", config: Changes = NONE, store: Where = None, rebuild: bool = False, gpu_limit: Limit = None
) -> Outcome:
    """Evaluate, and nothing else. The trained model must be in the store."""
    return _run(preset, config, store, "evaluate", rebuild, alone=True, gpu_limit=gpu_limit)


@described_flow
def sample(
    preset: Preset = "demo", config: Changes = NONE, store: Where = None, rebuild: bool = False, gpu_limit: Limit = None
) -> Outcome:
    """Draw samples, and nothing else. The trained model must be in the store."""
    return _run(preset, config, store, "sample", rebuild, alone=True, gpu_limit=gpu_limit)


def run_pipeline(
    config: Config, store: str, until: str, rebuild: str | None, console: Watcher, server: Callable[[], str]
) -> Records:
    """Run the flow `pipeline` in this process, on the server that the settings name, else on that of this address."""

    def stop(*_: Any) -> None:
        raise Stopped("stopped by a signal; finished stages, parts and checkpoints are kept: run again to continue")

    with ExitStack() as stack:
        if get_current_settings().api.url:
            check_server()
        else:
            stack.enter_context(temporary_settings({PREFECT_API_URL: server()}))
        stack.enter_context(tags(TAG))
        stack.callback(WATCHER.reset, WATCHER.set(console))
        stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, stop))
        try:
            return pipeline(*as_changes(config), store, until, rebuild)  # type: ignore[arg-type]
        except BaseException as ended:
            if isinstance(ended.__cause__, Stopped):  # by somebody who cancelled this run on a shared server
                raise ended.__cause__ from None
            raise
