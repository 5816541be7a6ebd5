"""What a store costs: requests of a lookup and of a publication, and transfers beside those of plain fsspec.

nanodlm bench store --store s3://bucket/prefix
"""

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from nanodlm.errors import UsageError
from nanodlm.store import SCHEMA, Store, new_attempt
from nanodlm.store.cache import drop

IDENTITY = {"schema": SCHEMA, "stage": "bench", "version": 1, "parameters": {}, "inputs": {}}


@contextmanager
def counted(store: Store) -> Iterator[dict[str, int]]:
    """Count the requests of a store's driver while this lasts, by the name of the operation; S3 and GCS only."""
    counts: dict[str, int] = {}
    name = {"s3": "_call_s3", "gs": "_call"}.get(store.uri().partition(":")[0])
    if name is None:
        yield counts
        return
    original = getattr(store.fs, name)

    def call(operation: str, *args: Any, **kwargs: Any) -> Any:
        counts[operation] = counts.get(operation, 0) + 1
        return original(operation, *args, **kwargs)

    setattr(store.fs, name, call)
    try:
        yield counts
    finally:
        delattr(store.fs, name)


def measure(
    url: str,
    *,
    files: int = 32,
    megabytes: float = 4.0,
    repeats: int = 6,
    emit: Callable[..., None] = lambda *_, **__: None,
) -> dict[str, Any]:
    """Publish and stage artifacts of random bytes, in turn with plain recursive transfers of the same files.

    Everything lies below a folder of its own, `bench-…`, which is removed at the end.

    Args:
        url: A store; on local disk there are neither requests nor transfers to measure.
        files: Files of an artifact.
        megabytes: Size of each.
        repeats: Transfers of each kind, of which medians are compared.
        emit: Called as `emit(kind, **fields)` with progress.

    Returns:
        `requests_hit`, `requests_miss` (of looking one stage up) and `requests_publish` (of an artifact with so many
        files, without its lease), by operation; `publish_mb_per_second`, `stage_mb_per_second`, the same for
        `plain_put` and `plain_get`; and `publish_ratio`, `stage_ratio`, ours over plain.

    Raises:
        UsageError: For a store on local disk, or nothing to measure.
    """
    root = Store(url)
    if root.is_local:
        raise UsageError("a store on local disk is used in place, nothing is transferred: name a bucket with --store")
    if files < 1 or repeats < 1 or megabytes <= 0:
        raise UsageError("nothing to measure: raise --files, --megabytes or --repeats")
    store = Store(root.uri(f"bench-{secrets.token_hex(4)}"))
    seconds: dict[str, list[float]] = {"publish": [], "plain_put": [], "stage": [], "plain_get": []}
    requests: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        source.mkdir()
        for i in range(files):
            (source / f"file-{i:04d}").write_bytes(os.urandom(int(megabytes * 1e6)))
        try:
            with counted(store) as requests["requests_miss"]:
                store.find("bench", "none")
            for repeat in range(repeats + 1):  # the first opens connections, and is not counted
                pairs = (
                    {"publish": partial(_publish, source), "plain_put": partial(_plain_put, source)},
                    {"stage": _stage, "plain_get": partial(_plain_get, Path(scratch) / "plain")},
                )
                for pair in pairs:  # each goes first in every other round, for the server has work left from the last
                    for name in sorted(pair, reverse=repeat % 2 == 0):
                        took, counts = pair[name](store, repeat)
                        seconds[name].append(took)
                        requests |= counts
                emit("progress", done=repeat, total=repeats, unit="rounds")
        finally:
            store.remove_folder(store.root)
    size = files * megabytes
    speeds = {name: size / median(found[1:]) for name, found in seconds.items()}
    return {
        **requests,
        **{f"{name}_mb_per_second": speed for name, speed in speeds.items()},
        "publish_ratio": speeds["publish"] / speeds["plain_put"],
        "stage_ratio": speeds["stage"] / speeds["plain_get"],
    }


def _publish(source: Path, store: Store, repeat: int) -> tuple[float, dict[str, dict[str, int]]]:
    with new_attempt(store, "bench", f"{repeat:016x}") as attempt:
        for path in source.iterdir():
            shutil.copy(path, attempt.path)
        began = time.perf_counter()
        with counted(store) as requests:
            attempt.commit(identity=IDENTITY, metrics={})
        return time.perf_counter() - began, {"requests_publish": requests}


def _plain_put(source: Path, store: Store, repeat: int) -> tuple[float, dict[str, dict[str, int]]]:
    began = time.perf_counter()
    store.fs.put(f"{source}/", store.path(f"plain-{repeat}/"), recursive=True)
    return time.perf_counter() - began, {}


def _stage(store: Store, repeat: int) -> tuple[float, dict[str, dict[str, int]]]:
    with counted(store) as requests:
        found = store.find("bench", f"{repeat:016x}")
        assert found is not None
        found.check()
    began = time.perf_counter()
    found.local()
    took = time.perf_counter() - began
    drop(f"bench-{found.fingerprint}-{found.manifest['attempt']}")
    return took, {"requests_hit": requests}


def _plain_get(target: Path, store: Store, repeat: int) -> tuple[float, dict[str, dict[str, int]]]:
    began = time.perf_counter()
    store.fs.get(store.path(f"plain-{repeat}/"), f"{target}/", recursive=True)
    took = time.perf_counter() - began
    shutil.rmtree(target)
    return took, {}
