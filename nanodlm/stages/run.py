"""The one way to run a stage: look it up, else build it and commit what it made."""

import os
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from nanodlm.config import Config
from nanodlm.errors import Emit, NanodlmError, UsageError, full_disk_named, silent
from nanodlm.precision import measured
from nanodlm.provenance import changed_since, code_record, remark
from nanodlm.stages.lookup import Lookup, identify, ready
from nanodlm.stages.table import STAGES, check, until
from nanodlm.store import Artifact, Json, Store, hold_lease, new_attempt
from nanodlm.store.cache import cache_dir, keep_compiled

COMMIT_SECONDS = 600.0  # for process 0 to hash and publish what several processes made


def run_stage(
    name: str,
    config: Config,
    store: Store,
    *,
    rebuild: bool = False,
    restore: Json | None = None,
    helping: bool = False,
    inputs: dict[str, Artifact] | None = None,
    emit: Emit = silent,
) -> tuple[Artifact, dict[str, Any]]:
    """Return a stage's artifact, which is built in this process unless the store holds it, and its `record`.

    While another process is building the same artifact, wait for that. A rebuild of equal bytes by equal code leaves
    the old manifest in place; with a manifest to `restore`, one of other bytes is refused. Inputs are given where it is
    known that the stage is to be built. Of processes that train together, all are `helping` but process 0.
    """
    started = time.monotonic()
    store.emit = emit
    if STAGES[name].own_process:
        keep_compiled()
    lookup = ready(name, config, store, rebuild=rebuild) if inputs is None else identify(STAGES[name], config, inputs)
    if lookup.note:
        emit("message", text=lookup.note)
    config, lookup = measured(lookup.stage.of(config)), replace(lookup, stage=STAGES[lookup.stage.folder])
    if lookup.artifact and not rebuild:
        artifact, built = lookup.artifact, False
    elif helping:
        artifact, built = _help(lookup, config, store, rebuild, emit)
    else:
        artifact, built = build(lookup, config, store, rebuild, emit, restore)
    return artifact, record(artifact, "built" if built else "cached", time.monotonic() - started, name)


def build(
    lookup: Lookup, config: Config, store: Store, rebuild: bool, emit: Emit, restore: Json | None = None
) -> tuple[Artifact, bool]:
    """Build a stage under its lease; return the artifact, and if this run built it."""
    stage, fingerprint = lookup.stage, lookup.fingerprint
    check(config, (stage.name,))
    for artifact in lookup.inputs.values():
        if stage.own_process and (changed := changed_since(artifact)):
            emit("message", text=f"the {artifact.stage} artifact was {remark(changed)}")
    with hold_lease(store, stage.name, fingerprint, emit, lookup.input_fingerprints) as lease:

        def publish(kind: str, **fields: Any) -> None:
            lease["events"] = {**lease["events"], kind: fields}  # whoever waits elsewhere reads the lease
            emit(kind, **fields)

        store.emit = publish
        existing = lookup.find_in(store, may_be_damaged=rebuild).artifact
        if existing and (not rebuild or (restore and not existing.problems(deep=True))):  # another was quicker
            return existing, False
        afresh = existing is not None and restore is None
        if afresh:
            others = (other for _, other in store.artifacts(store) if isinstance(other, Artifact))
            if made := [other.name for other in others if (stage.name, fingerprint) in other.inputs]:
                again = "where its bytes differ, a run makes them again, and what was made from them"
                emit("message", text=f"from the {stage.name} artifact there are {', '.join(made)}: {again}")
        attempting = new_attempt(store, stage.name, fingerprint, afresh=afresh, restore=restore)
        with full_disk_in_one_line(store), attempting as attempt:
            code = code_record(stage.module)  # as it is now, before anybody edits it
            metrics = stage.run(config, lookup.inputs, attempt, publish)
            reads_files = stage.name in ("download", "evaluate", "judge")
            if reads_files and identify(stage, config, lookup.inputs).fingerprint != fingerprint:
                raise NanodlmError("the source's files changed since they were looked up: run again")
            # Beside the digests that are part of the identity, the fingerprints tell where the inputs lie.
            lineage = {n: {"digest": a.digest, "fingerprint": a.fingerprint} for n, a in lookup.inputs.items()}
            artifact = attempt.commit(
                identity={**lookup.identity, "inputs": lineage},
                config=config.model_dump(mode="json"),
                code=code,
                metrics=metrics,
                volatile=stage.volatile,
                replace=rebuild,
            )
            return artifact, True


def _help(lookup: Lookup, config: Config, store: Store, rebuild: bool, emit: Emit) -> tuple[Artifact, bool]:
    """Take part in a stage that process 0 builds and commits, as `build` does there."""
    artifact = lookup.find_in(store, may_be_damaged=rebuild).artifact
    if artifact and not rebuild:
        return artifact, False
    lookup.stage.run(config, lookup.inputs, None, emit)
    deadline = time.monotonic() + COMMIT_SECONDS
    while (artifact := store.find(lookup.stage.name, lookup.fingerprint)) is None:
        if time.monotonic() > deadline:
            raise NanodlmError(f"process 0 did not commit the {lookup.stage.name} artifact: see what it says")
        time.sleep(0.2)
    return artifact, True


def full_disk_in_one_line(store: Store) -> AbstractContextManager[None]:
    """Turn whatever is raised when the disk of a store, or of the cache before it, is full into one line."""
    return full_disk_named(store.uri() if store.is_local else f"{store.uri()}, or into the cache {cache_dir()}")


def record(artifact: Artifact, status: str, seconds: float, stage: str) -> dict[str, Any]:
    """Return what `--json` and the flows say of a stage, with a status of `built` or `cached`."""
    told = {"stage": stage, "status": status, "uri": artifact.uri, "fingerprint": artifact.fingerprint}
    return {**told, "seconds": round(seconds, 3)}


def train(config: Config, store: str | None = None, emit: Emit = silent) -> Artifact:
    """Train a model, first building whatever data it needs, all in this process.

    A finished run is found rather than repeated, and an interrupted one continues from its last checkpoint.

    Args:
        config: The run's configuration.
        store: Folder or fsspec URL of the artifacts; by default `$NANODLM_STORE`, else `data/store`.
        emit: Called as `emit(kind, **fields)` with progress; `nanodlm.cli.console.Console(sys.stderr).emit` shows it.

    Returns:
        The train artifact: `.uri` is what `nanodlm.load` takes, `.metrics` what was measured.

    Example:
        run = nanodlm.train(nanodlm.PRESETS["demo"])
        print(run.uri, run.metrics["train_nats_per_token"])
    """
    opened = Store(store or default_store())
    found: dict[str, Artifact] = {}
    for name in until("train"):
        inputs = {needed: found[needed] for needed in STAGES[name].inputs(config)}
        lookup = ready(name, config, opened, inputs=inputs)
        if lookup.note:
            emit("message", text=lookup.note)
        if lookup.artifact is None:
            check(config, until("train"))
        found[name] = lookup.artifact or run_stage(name, config, opened, inputs=inputs, emit=emit)[0]
    return found["train"]


def default_store() -> str:
    """Return `$NANODLM_STORE`, else `data/store`."""
    return os.environ.get("NANODLM_STORE") or "data/store"


def enter_folder() -> None:
    """Go to the clone that the run was deployed from, where prefect.yaml names one."""
    try:
        os.chdir(os.environ.get("NANODLM_FOLDER", "."))
    except OSError as error:
        moved = f"{error.filename}, from where this was deployed, cannot be entered ({error.strerror})"
        raise UsageError(f"{moved}: `prefect --no-prompt deploy --all` in the clone tells where it is now") from error
