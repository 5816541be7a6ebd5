"""The one way to run a stage: look it up, else build it and commit what it made."""

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from nanodlm.config import Config
from nanodlm.errors import NanodlmError
from nanodlm.stages.lookup import Lookup, ready
from nanodlm.stages.table import Emit, until
from nanodlm.store import Artifact, Store, hold_lease, new_attempt
from nanodlm.store.cache import cache_dir

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
COMMIT_SECONDS = 600.0  # for process 0 to hash and publish what several processes made


def run_stage(
    name: str,
    config: Config,
    store: Store,
    *,
    rebuild: bool = False,
    follow: bool = False,
    inputs: dict[str, Artifact] | None = None,
    emit: Emit = lambda *_, **__: None,
) -> tuple[Artifact, dict[str, Any]]:
    """Find a stage's artifact or build it, here and now, its inputs being there.

    When another process is building the same artifact, wait for it.

    Args:
        name: One of `STAGES`.
        config: The run's configuration.
        store: Where artifacts lie.
        rebuild: Build even when the artifact exists; equal bytes leave the old manifest in place.
        follow: Whether this process helps another one, which has the attempt and commits it.
        inputs: Its input artifacts, where they are known; else they are looked up, from the source on.
        emit: Called as `emit(kind, **fields)` with progress.

    Returns:
        The artifact, and a record with `stage`, `status` (built or cached), `uri`, `fingerprint`, `seconds`.
    """
    started = time.monotonic()
    store.emit = emit
    lookup, inputs = ready(name, config, store, rebuild=rebuild, inputs=inputs)
    assert lookup.identity is not None
    assert lookup.fingerprint is not None
    stage, artifact, status = lookup.stage, lookup.artifact, "cached"
    if follow and (artifact is None or rebuild):
        module, function = stage.build.split(":")
        getattr(import_module(module), function)(config, inputs, None)
        done = time.monotonic()
        while (artifact := store.find(name, lookup.fingerprint)) is None:
            if time.monotonic() > done + COMMIT_SECONDS:
                raise NanodlmError(f"process 0 did not commit the {name} artifact: see what it says")
            time.sleep(0.2)
        return artifact, record(artifact, "built", time.monotonic() - started)
    if artifact is None or rebuild:
        reads = {input_: found.fingerprint for input_, found in inputs.items()}
        with hold_lease(store, name, lookup.fingerprint, lambda text: emit("message", text=text), reads) as mine:

            def publish(kind: str, **fields: Any) -> None:
                mine["events"] = {**mine["events"], kind: fields}  # whoever waits elsewhere reads the lease
                emit(kind, **fields)

            store.emit = publish
            artifact = None if rebuild else store.find(name, lookup.fingerprint)  # another run may have been quicker
            if artifact is None:
                artifact, status = _build(lookup, config, store, inputs, rebuild, publish), "built"
    return artifact, record(artifact, status, time.monotonic() - started)


def _build(
    lookup: Lookup, config: Config, store: Store, inputs: dict[str, Artifact], rebuild: bool, emit: Emit
) -> Artifact:
    assert lookup.identity is not None
    assert lookup.fingerprint is not None
    module, function = lookup.stage.build.split(":")
    afresh = rebuild and lookup.artifact is not None
    with (
        full_disk_in_one_line(store),
        new_attempt(store, lookup.stage.name, lookup.fingerprint, afresh=afresh) as attempt,
    ):
        metrics = getattr(import_module(module), function)(config, inputs, attempt, emit)
        # Beside the digests that are part of the identity, the fingerprints tell where the inputs lie.
        lineage = {n: {"digest": a.digest, "fingerprint": a.fingerprint} for n, a in inputs.items()}
        return attempt.commit(
            identity={**lookup.identity, "inputs": lineage},
            config=config.model_dump(mode="json"),
            metrics=metrics,
            volatile=lookup.stage.volatile,
            replace=rebuild,
        )


@contextmanager
def full_disk_in_one_line(store: Store) -> Iterator[None]:
    """Say in one line when a disk is full, whoever wrote to it."""
    try:
        yield
    except Exception as error:  # libraries that write by themselves say it in words of their own
        said = {getattr(error, "errno", None), *(code for code in FULL if os.strerror(code) in str(error))}
        if isinstance(error, NanodlmError) or not (full := said & FULL):
            raise
        where = store.uri() if store.is_local else f"{store.uri()}, or into the cache {cache_dir()}"
        raise NanodlmError(
            f"nothing more fits into {where}: {os.strerror(full.pop())}; make room and run again, what is finished is "
            "kept"
        ) from error


def record(artifact: Artifact, status: str, seconds: float) -> dict[str, Any]:
    """What `--json` and the flows say of a stage."""
    return {
        "stage": artifact.stage,
        "status": status,
        "uri": artifact.uri,
        "fingerprint": artifact.fingerprint,
        "seconds": round(seconds, 3),
    }


def train(config: Config, store: str | None = None, emit: Emit = lambda *_, **__: None) -> Artifact:
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
    for name in until("train"):
        artifact, _ = run_stage(name, config, opened, emit=emit)
    return artifact  # type: ignore[possibly-unbound]


def default_store() -> str:
    """`$NANODLM_STORE`, else `data/store`."""
    return os.environ.get("NANODLM_STORE") or "data/store"
