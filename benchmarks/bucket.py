"""Measure what a bucket costs: requests of a lookup and of a publication, and transfers beside a plain driver's.

    python -m benchmarks.bucket s3://bucket/prefix        # a minute or so; needs what reaches the bucket

Everything lies below a folder of its own, `bench-…`, which is removed at the end. Requests are counted by a proxy, and
only where the bucket's server is one that `$AWS_ENDPOINT_URL` or `$STORAGE_EMULATOR_HOST` names, as plain http.
"""

import os
import secrets
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple
from unittest import mock
from urllib.parse import urlsplit

import fsspec
import psutil
import tyro

from benchmarks.wire import counted
from nanodlm.errors import UsageError
from nanodlm.store import SCHEMA, Store, cache, new_attempt
from nanodlm.store.bucket import Bucket
from nanodlm.store.disk import sha256_of
from nanodlm.store.files import REQUESTS


class Times(NamedTuple):
    """What a call took, in seconds: by the clock, and of the processors for this process and for the server."""

    wall: float
    here: float
    server: float


IDENTITY = {"schema": SCHEMA, "stage": "bench", "version": 1, "parameters": {}, "inputs": {}}


def bucket(
    url: Annotated[str, tyro.conf.Positional], files: int = 32, megabytes: float = 4.0, repeats: int = 6
) -> dict[str, Any]:
    """Publish and stage artifacts of random bytes, in turn with plain transfers of the same files.

    Plain is obstore alone on S3, each file sent from disk and written to disk by a thread of its own, and no sha256;
    elsewhere it is fsspec's recursive `put` and `get`.

    Args:
        url: A store on S3 or GCS.
        files: Files of an artifact.
        megabytes: Size of each.
        repeats: Transfers of each kind, of which medians are compared.

    Returns:
        `requests_hit`, `requests_miss` (of looking one stage up) and `requests_publish` (of an artifact with so many
        files, without its lease), by method; `publish_mb_per_second`, `stage_mb_per_second`, the same for
        `plain_put` and `plain_get`, with the `_cpu_seconds` of each, and the server's where it is a process here;
        `sha256_cpu_seconds` of the same bytes; and `publish_ratio`, `stage_ratio`, ours over plain.

    Raises:
        UsageError: For a store on local disk, where there are neither requests nor transfers to measure.
    """
    if Store(url).is_local:
        raise UsageError("a store on local disk is used in place, nothing is transferred: name a bucket")
    store = Store(Store(url).uri(f"bench-{secrets.token_hex(4)}"))
    taken: dict[str, list[Times]] = {"publish": [], "plain_put": [], "stage": [], "plain_get": []}
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "source", Path(scratch) / "plain"
        source.mkdir()
        for i in range(files):
            (source / f"file-{i:04d}").write_bytes(os.urandom(int(megabytes * 1e6)))
        put, get = _plain(store, source, target)

        def publish(fingerprint: str) -> Times:
            with new_attempt(store, "bench", fingerprint) as attempt:
                shutil.copytree(source, attempt.path, dirs_exist_ok=True)
                return _times(lambda: attempt.commit(identity=IDENTITY, metrics={}))

        def stage(fingerprint: str) -> Times:
            (found := store.open(store.uri("bench", fingerprint))).check()
            times = _times(found.local)
            shutil.rmtree(cache.cache_dir())
            return times

        def plain_put(fingerprint: str) -> Times:
            return _times(lambda: put(fingerprint))

        def plain_get(fingerprint: str) -> Times:
            target.mkdir()
            times = _times(lambda: get(fingerprint))
            shutil.rmtree(target)
            return times

        try:
            with mock.patch.dict(os.environ, NANODLM_CACHE=str(Path(scratch) / "cache")):
                for repeat in range(repeats + 1):  # the first opens connections, and is not counted
                    for pair in ((publish, plain_put), (stage, plain_get)):
                        for call in pair[:: 1 if repeat % 2 else -1]:  # the second finds the server busy with the first
                            taken[call.__name__].append(call(f"{repeat:016x}"))
                requests = _requests(store, source)
        finally:
            store.remove_folder(store.root)
        hashing = _times(lambda: [sha256_of(path) for path in source.iterdir()])
    medians = {name: Times(*map(median, zip(*times[1:], strict=True))) for name, times in taken.items()}
    speeds = {name: files * megabytes / times.wall for name, times in medians.items()}
    result = {
        **requests,
        **{f"{name}_mb_per_second": speed for name, speed in speeds.items()},
        **{f"{name}_cpu_seconds": times.here for name, times in medians.items()},
        **{f"{name}_server_cpu_seconds": times.server for name, times in medians.items()},
        "sha256_cpu_seconds": hashing.here,
        "publish_ratio": speeds["publish"] / speeds["plain_put"],
        "stage_ratio": speeds["stage"] / speeds["plain_get"],
    }
    for name, value in result.items():
        print(f"{name:<25} {value}")
    return result


def _plain(store: Store, source: Path, target: Path) -> tuple[Callable[[str], Any], Callable[[str], Any]]:
    """Return what sends the files of a folder, and what fetches them to another, by a driver alone."""
    if not isinstance(store.driver, Bucket):
        fs = store.driver.fs  # type: ignore[union-attr]
        return (
            lambda name: fs.put(f"{source}/", store.path(f"plain-{name}/"), recursive=True),
            lambda name: fs.get(store.path(f"plain-{name}/"), f"{target}/", recursive=True),
        )
    plain, below = store.driver.store, store.root.partition("/")[2]

    def get(key: str, path: Path) -> None:
        with path.open("wb") as file:
            for piece in plain.get(key).stream():
                file.write(piece)

    def each(call: Callable[[str, Path], Any], name: str, folder: Path) -> None:
        with ThreadPoolExecutor(REQUESTS) as pool:
            list(pool.map(lambda path: call(f"{below}/plain-{name}/{path.name}", folder / path.name), source.iterdir()))

    return lambda name: each(plain.put, name, source), lambda name: each(get, name, target)


def _requests(store: Store, source: Path) -> dict[str, dict[str, int]]:
    """Count the requests of a publication, and of lookups of what is there and of what is not."""
    found = {}
    with _through_a_proxy(store.uri()) as (there, counts):
        for name in ("requests_publish", "requests_hit", "requests_miss"):
            if name == "requests_publish":
                with new_attempt(there, "bench", "counted") as attempt:
                    shutil.copytree(source, attempt.path, dirs_exist_ok=True)
                    counts.clear()
                    attempt.commit(identity=IDENTITY, metrics={})
            elif name == "requests_hit":
                there.open(there.uri("bench", "counted")).check()
            else:
                there.find("bench", "none")
            found[name] = dict(counts)
            counts.clear()
    return found


@contextmanager
def _through_a_proxy(url: str) -> Iterator[tuple[Store, Counter[str]]]:
    with counted() as (variables, counts), mock.patch.dict(os.environ, variables):
        if url.startswith("gs://"):  # whose driver keeps its connections
            fsspec.get_filesystem_class("gs").clear_instance_cache()
        yield Store(url), counts


def _times(call: Callable[[], Any]) -> Times:
    before = time.perf_counter(), time.process_time(), _server_seconds()
    call()
    after = time.perf_counter(), time.process_time(), _server_seconds()
    return Times(*(then - now for now, then in zip(before, after, strict=True)))


def _server_seconds() -> float:
    """Return the CPU seconds that the bucket's server has used; 0 where it is no process of this machine."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("STORAGE_EMULATOR_HOST") or ""
    port = urlsplit(endpoint).port
    listening = (found for found in psutil.net_connections("tcp") if found.status == psutil.CONN_LISTEN)
    pid = next((found.pid for found in listening if found.laddr[1:] == (port,)), None)
    return sum(psutil.Process(pid).cpu_times()[:2]) if pid else 0.0


if __name__ == "__main__":
    tyro.cli(bucket, use_underscores=True)
