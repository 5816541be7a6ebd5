"""Local copies of what lies in remote stores: verified, bounded, shared by the processes of one machine.

    {cache}/entries/{name}/files/...     copies; each appears whole, after its sha256 was checked
    {cache}/entries/{name}/used          locked by every process that uses the entry; its time is that of the last use
    {cache}/entries/{name}/arriving/...  copies on their way
    {cache}/entries/{name}/locks/...     one of each file, so that two processes do not fetch it
    {cache}/manifests/...                manifests of what was found, for when no store may be asked
    {cache}/lock                         held while entries are opened or thrown out

An entry is all copies of one artifact, or the files of one attempt. Locks (`flock`) end with their process.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from filelock import FileLock

from nanodlm.errors import Damaged, NanodlmError
from nanodlm.store.disk import is_whole, list_files
from nanodlm.store.manifest import Json
from nanodlm.store.retry import one_line

THREADS, GROUP = 2, 8  # that fetch and verify, and files of each at once
_held: dict[Path, IO[str]] = {}  # entries in use by this process; the open files hold their locks


def cache_dir() -> Path:
    """Return the folder of copies: `$NANODLM_CACHE`, else `~/.cache/nanodlm`."""
    return Path(os.environ.get("NANODLM_CACHE") or Path.home() / ".cache" / "nanodlm")


def limit() -> int:
    """Return the bytes that entries may take together: `$NANODLM_CACHE_GB`, else 100 GB."""
    text = os.environ.get("NANODLM_CACHE_GB") or "100"
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1e9:  # neither nan nor inf
            return int(float(text) * 1e9)
    raise NanodlmError(f"NANODLM_CACHE_GB must be a number of gigabytes above 0, not {text!r}")


def hold(name: str, needed: int = 0) -> Path:
    """Open an entry until this process ends, make room for the bytes `needed`, and return the folder for its files."""
    entry = cache_dir() / "entries" / name
    try:
        with FileLock(cache_dir() / "lock"):
            (entry / "files").mkdir(parents=True, exist_ok=True)
            if entry not in _held:
                _held[entry] = (entry / "used").open("a")
                fcntl.flock(_held[entry], fcntl.LOCK_SH)
            os.utime(entry / "used")
            _make_room(needed)
    except OSError as error:
        raise cannot_write_cache(error) from error
    return entry / "files"


def cannot_write_cache(error: OSError) -> NanodlmError:
    """Return the error, in one line, of a cache that cannot be written."""
    remedy = "set NANODLM_CACHE to a folder with room"
    return NanodlmError(f"cannot write to the cache {cache_dir()}: {one_line(error)}; {remedy}")


def drop(name: str) -> None:
    """Throw an entry out that this process alone has used."""
    entry = cache_dir() / "entries" / name
    with FileLock(cache_dir() / "lock"):
        if held := _held.pop(entry, None):
            held.close()
        shutil.rmtree(entry, ignore_errors=True)


def fetch(
    folder: Path, files: list[Json], get: Callable[[list[tuple[str, Path]]], None], arrived: Callable[[int], None]
) -> None:
    """Make local copies of files in what `hold` returned, several at a time, of those that are not there whole.

    Two processes do not fetch the same file: one waits, and then finds it. `get` copies files, given by their `path`,
    to local paths; what arrives altered is not kept. `arrived` is called with numbers of bytes that are there.
    """

    def fetch_some(some: list[Json]) -> int:
        with contextlib.ExitStack() as locks:
            for file in some:  # in the order of paths for everyone, so nobody deadlocks
                locks.enter_context(FileLock(folder.parent / "locks" / file["path"]))
            missing = [file for file in some if not is_whole(folder / file["path"], file)]
            arriving = [(file["path"], folder.parent / "arriving" / file["path"]) for file in missing]
            if missing:
                get(arriving)
            for file, (path, there) in zip(missing, arriving, strict=True):
                if not is_whole(there, file):
                    there.unlink(missing_ok=True)
                    raise Damaged(f"{path} has been altered")
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                there.replace(folder / path)
        return sum(file["size"] for file in some)

    files = sorted(files, key=lambda file: file["path"])
    groups = [files[i : i + GROUP] for i in range(0, len(files), GROUP)]
    with ThreadPoolExecutor(THREADS, thread_name_prefix="fetch") as pool:  # some verify while others transfer
        for size in pool.map(fetch_some, groups):  # which begins no more after one that fails
            arrived(size)


def _make_room(needed: int) -> None:
    """Throw out what nobody uses, the least recently used first, until `needed` more bytes fit."""
    used = sorted((cache_dir() / "entries").glob("*/used"), key=lambda file: file.stat().st_mtime)
    sizes = {file.parent: sum(found.size for found in list_files(str(file.parent)).values()) for file in used}
    total = sum(sizes.values())
    for entry, size in sizes.items():
        wanted = total + needed > limit() or entry.name.startswith("attempt-")  # which a killed run has left
        if wanted and _is_unused(entry):
            shutil.rmtree(entry, ignore_errors=True)
            total -= size
    if needed and total + needed > limit():
        room = f"{limit() / 1e9:.3g} GB, of which {total / 1e9:.3g} are in use, and {needed / 1e9:.3g} more are needed"
        raise NanodlmError(f"the cache {cache_dir()} may hold {room}: raise NANODLM_CACHE_GB")


def _is_unused(entry: Path) -> bool:
    """Say if no process holds an entry, this one among them; nobody can take it while the cache's own lock is held."""
    with (entry / "used").open("a") as file, contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False
