"""The pipeline as Prefect flows, whole or in parts: one task per stage. What the store holds ends as `Cached`.

nanodlm run                              # on a server of its own
python -m flows.pipeline                 # on the server that PREFECT_API_URL names
prefect deployment run pipeline/demo     # on a worker, once `prefect deploy --all` was run; see docs/operations.md
"""

import os
import signal
from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import Any, Literal, TypeVar

from prefect import flow, tags
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_LEVEL, get_current_settings, temporary_settings
from prefect.utilities.annotations import quote

from flows.environment import TAG
from flows.reporting import WATCHER, Watcher, current_watcher
from flows.server import check_server, ephemeral_server
from flows.shards import shard_in_parallel, task_runner
from flows.stage import HERE, stage_task
from nanodlm.cluster.settings import Launch
from nanodlm.config import PRESETS, Config, StoreUrl
from nanodlm.errors import Stopped, UsageError
from nanodlm.stages import table
from nanodlm.stages.run import default_store
from nanodlm.stages.table import STAGES, check_rebuild
from nanodlm.store import Artifact, fingerprint_of

StageName = Literal["download", "tokenizer", "split", "shard", "train", "evaluate", "sample"]
DataStageName = Literal["download", "tokenizer", "split", "shard"]


def _run_name() -> str:
    """Return the preset and the start of a fingerprint of all settings, such as `demo-1f2e3d4c`."""
    config = Config.model_validate(flow_run.parameters["config"])
    preset = next((name for name, preset in PRESETS.items() if preset == config), "custom")
    return f"{preset}-{fingerprint_of(config.model_dump(mode='json'))[:8]}"


def _run(
    config: Config,
    store: str | None,
    names: Collection[str],
    rebuild: str | None,
    gpu_limit: str | None = None,
    train_on: Launch = HERE,
    *,
    alone: str | None = None,
) -> list[dict[str, Any]]:
    """Go through stages in order, and return their records; with `alone`, all others must be in the store."""
    found: dict[str, Artifact] = {}
    records = []
    url = store or default_store()
    if url.startswith("memory:"):
        raise UsageError("a store in memory is seen by no other process: give store a folder or a bucket")
    for name in names:
        inputs = {needed: found[needed] for needed in STAGES[name].inputs(config)}
        if name == "shard" and not alone and name != rebuild:
            shard_in_parallel(config, url, inputs, current_watcher())
        state = stage_task.with_options(name=name, task_run_name=name, tags=[name])(
            name,
            config,
            url,
            quote(inputs),  # type: ignore[arg-type]
            build=alone in (None, name),
            rebuild=name == rebuild,
            gpu_limit=gpu_limit,
            train_on=train_on,
            return_state=True,
        )
        found[name], record = state.result()
        records.append(record)
    return records


def _run_alone(
    name: str, config: Config, store: str | None, rebuild: bool, gpu_limit: str | None, train_on: Launch = HERE
) -> list[dict[str, Any]]:
    """Run one stage, after a look at all it is made from."""
    needed = {name}
    for earlier in reversed(table.until(name)):
        if earlier in needed:
            needed |= set(STAGES[earlier].inputs(config))
    names = [earlier for earlier in table.until(name) if earlier in needed]
    return _run(config, store, names, name if rebuild else None, gpu_limit, train_on, alone=name)


F = TypeVar("F", bound=Callable[..., Any])
PARAMETERS = """
    Args:
        config: Every setting of the run.
        store: Where artifacts lie: a folder, or an address such as s3://bucket/prefix, without credentials, which come
            from the worker's environment. Without it that of the worker's NANODLM_STORE, else data/store.
        until: The last stage to run.
        rebuild: What to build even though the store holds it.
        gpu_limit: A concurrency limit to hold a slot of while a stage uses the accelerator, where the server has it.
        train_on: Where to train: in a process of the worker, or as a job of a Slurm or Kubernetes cluster.

    Returns:
        For each stage `stage`, `status` (built or cached), `uri`, `fingerprint` and `seconds`.
"""


def described(function: F) -> F:
    """Add `PARAMETERS` to a flow's docstring, from which Prefect takes what its forms say."""
    function.__doc__ = f"{function.__doc__}\n{PARAMETERS}"
    return function


@flow(flow_run_name=_run_name, persist_result=False)
@described
def pipeline(
    config: Config = PRESETS["demo"],
    store: StoreUrl | None = None,
    until: StageName = "sample",
    rebuild: StageName | None = None,
    gpu_limit: str | None = None,
    train_on: Launch = HERE,
) -> list[dict[str, Any]]:
    """Go from text to samples: build what the store lacks, stage by stage, and the report at the end."""
    check_rebuild(rebuild, until)
    return _run(config, store, table.until(until), rebuild, gpu_limit, train_on)


@flow(flow_run_name=_run_name, persist_result=False)
@described
def prepare(
    config: Config = PRESETS["demo"], store: StoreUrl | None = None, rebuild: DataStageName | None = None
) -> list[dict[str, Any]]:
    """Prepare the data, up to the shards. It needs no accelerator."""
    return _run(config, store, table.until("shard"), rebuild)


@flow(flow_run_name=_run_name, persist_result=False)
@described
def train(
    config: Config = PRESETS["demo"],
    store: StoreUrl | None = None,
    rebuild: bool = False,
    gpu_limit: str | None = None,
    train_on: Launch = HERE,
) -> list[dict[str, Any]]:
    """Train, and nothing else: from the last checkpoint on, if there is one. The shards must be in the store."""
    return _run_alone("train", config, store, rebuild, gpu_limit, train_on)


@flow(flow_run_name=_run_name, persist_result=False)
@described
def evaluate(
    config: Config = PRESETS["demo"], store: StoreUrl | None = None, rebuild: bool = False, gpu_limit: str | None = None
) -> list[dict[str, Any]]:
    """Evaluate, and nothing else. The trained model must be in the store."""
    return _run_alone("evaluate", config, store, rebuild, gpu_limit)


@flow(flow_run_name=_run_name, persist_result=False)
@described
def sample(
    config: Config = PRESETS["demo"], store: StoreUrl | None = None, rebuild: bool = False, gpu_limit: str | None = None
) -> list[dict[str, Any]]:
    """Draw samples, and nothing else. The trained model must be in the store."""
    return _run_alone("sample", config, store, rebuild, gpu_limit)


def run_pipeline(
    config: Config,
    store: str,
    until: str,
    rebuild: str | None,
    watcher: Watcher,
    verbose: bool = False,
    runner: str | None = None,
    workers: int | None = None,
) -> list[dict[str, Any]]:
    """Run the flow `pipeline` in this process, on the server that the settings name, else on one started for it.

    Raises:
        Stopped: On SIGTERM, after a training has saved.
    """
    task_runner(runner, workers)  # refuses what cannot be before a server is started
    os.environ.update({name: str(v) for name, v in (("NANODLM_RUNNER", runner), ("NANODLM_WORKERS", workers)) if v})

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
