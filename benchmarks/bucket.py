"""Measure what a bucket costs: requests of a lookup and of a publication, and transfers beside plain fsspec's.

    python -m benchmarks.bucket s3://bucket/prefix        # a minute or so; needs what reaches the bucket

Everything lies below a folder of its own, `bench-…`, which is removed at the end.
"""

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import tyro

from nanodlm.errors import UsageError
from nanodlm.store import SCHEMA, Store, new_attempt
from nanodlm.store.cache import drop

IDENTITY = {"schema": SCHEMA, "stage": "bench", "version": 1, "parameters": {}, "inputs": {}}


@contextmanager
def counted(store: Store) -> Iterator[dict[str, int]]:
    """Count the requests of a store's driver while this lasts, by the name of the operation; S3 and GCS only."""
    counts: dict[str, int] = {}
    name = {"s3": "_call_s3", "gs": "_call"}[store.uri().partition(":")[0]]
    original = getattr(store.fs, name)

    def call(operation: str, *args: Any, **kwargs: Any) -> Any:
        counts[operation] = counts.get(operation, 0) + 1
        return original(operation, *args, **kwargs)

    setattr(store.fs, name, call)
    try:
        yield counts
    finally:
        delattr(store.fs, name)


def bucket(
    url: Annotated[str, tyro.conf.Positional], files: int = 32, megabytes: float = 4.0, repeats: int = 6
) -> dict[str, Any]:
    """Publish and stage artifacts of random bytes, in turn with plain recursive transfers of the same files.

    Args:
        url: A store on S3 or GCS.
        files: Files of an artifact.
        megabytes: Size of each.
        repeats: Transfers of each kind, of which medians are compared.

    Returns:
        `requests_hit`, `requests_miss` (of looking one stage up) and `requests_publish` (of an artifact with so many
        files, without its lease), by operation; `publish_mb_per_second`, `stage_mb_per_second`, the same for
        `plain_put` and `plain_get`; and `publish_ratio`, `stage_ratio`, ours over plain.

    Raises:
        UsageError: For a store on local disk, where there are neither requests nor transfers to measure.
    """
    if Store(url).is_local:
        raise UsageError("a store on local disk is used in place, nothing is transferred: name a bucket")
    store = Store(Store(url).uri(f"bench-{secrets.token_hex(4)}"))
    seconds: dict[str, list[float]] = {"publish": [], "plain_put": [], "stage": [], "plain_get": []}
    requests: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "source", Path(scratch) / "plain"
        source.mkdir()
        for i in range(files):
            (source / f"file-{i:04d}").write_bytes(os.urandom(int(megabytes * 1e6)))

        def publish(fingerprint: str) -> float:
            with new_attempt(store, "bench", fingerprint) as attempt:
                for path in source.iterdir():
                    shutil.copy(path, attempt.path)
                with counted(store) as requests["requests_publish"]:
                    return _seconds(lambda: attempt.commit(identity=IDENTITY, metrics={}))

        def plain_put(fingerprint: str) -> float:
            return _seconds(lambda: store.fs.put(f"{source}/", store.path(f"plain-{fingerprint}/"), recursive=True))

        def stage(fingerprint: str) -> float:
            with counted(store) as requests["requests_hit"]:
                (found := store.open(store.uri("bench", fingerprint))).check()
            taken = _seconds(found.local)
            drop(f"bench-{fingerprint}-{found.manifest['attempt']}")
            return taken

        def plain_get(fingerprint: str) -> float:
            taken = _seconds(lambda: store.fs.get(store.path(f"plain-{fingerprint}/"), f"{target}/", recursive=True))
            shutil.rmtree(target)
            return taken

        try:
            with counted(store) as requests["requests_miss"]:
                store.find("bench", "none")
            for repeat in range(repeats + 1):  # the first opens connections, and is not counted
                for pair in ((publish, plain_put), (stage, plain_get)):
                    for call in pair[:: 1 if repeat % 2 else -1]:  # the second finds the server busy with the first
                        seconds[call.__name__].append(call(f"{repeat:016x}"))
        finally:
            store.remove_folder(store.root)
    speeds = {name: files * megabytes / median(taken[1:]) for name, taken in seconds.items()}
    result = {
        **requests,
        **{f"{name}_mb_per_second": speed for name, speed in speeds.items()},
        "publish_ratio": speeds["publish"] / speeds["plain_put"],
        "stage_ratio": speeds["stage"] / speeds["plain_get"],
    }
    for name, value in result.items():
        print(f"{name:<25} {value}")
    return result


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    tyro.cli(bucket, use_underscores=True)
