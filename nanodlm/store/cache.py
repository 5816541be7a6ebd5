"""Local copies of what lies in remote stores: verified, bounded, shared by the processes of one machine.

    {cache}/files/{sha256}       a copy, which appears whole, after its sha256 was checked
    {cache}/processes/{name}/    what one process uses: links to copies, and what it makes for a remote store
    {cache}/locks/...            which only spare processes from fetching the same at once
    {cache}/compiled/            programs that XLA has compiled, for the next process that runs the same

Nothing rests on locks, which some networks' disks lack: a copy that is thrown out stays with those that have linked it.
"""

import atexit
import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from nanodlm.errors import Damaged, NanodlmError
from nanodlm.store.disk import beside, is_whole, link, list_files
from nanodlm.store.manifest import Json
from nanodlm.store.owner import has_ended, this_process
from nanodlm.store.retry import number, one_line

LOCK_SECONDS = 60.0  # that another may take to fetch the same, before this process fetches it too
COMPILED = 10**9  # bytes of compiled programs; those of a run of the demo take a thousandth
OLD_SECONDS = 30 * 86400.0  # what a process of another machine has left is in use no more


def cache_dir() -> Path:
    """Return the folder of copies: `$NANODLM_CACHE`, else `~/.cache/nanodlm`, or where there is no home, in `/tmp`."""
    if named := os.environ.get("NANODLM_CACHE"):
        return Path(named)
    try:
        return Path.home() / ".cache" / "nanodlm"
    except RuntimeError:  # neither HOME nor an entry of this user
        return Path(tempfile.gettempdir()) / f"nanodlm-{os.getuid()}"


def limit() -> int:
    """Return the bytes that copies may take together: `$NANODLM_CACHE_GB`, else 100 GB."""
    return int(number("NANODLM_CACHE_GB", 100) * 1e9)


def keep_compiled() -> None:
    """Let this process, and those that it starts, keep what they compile and find what others have kept.

    JAX finds a program by its code and shapes, by JAX's version and the processor's instructions, so machines of many
    kinds may share a home. A folder that the user names, in `$JAX_COMPILATION_CACHE_DIR` or in JAX, is left alone; an
    empty name keeps nothing.
    """
    jax, name, folder, room = sys.modules.get("jax"), "JAX_COMPILATION_CACHE_DIR", cache_dir() / "compiled", COMPILED
    if (jax.config.jax_compilation_cache_dir if jax else os.environ.get(name)) is not None:
        return
    # What was read longest ago goes. JAX's own bound is slow, needs locks, and keeps nothing after some kills.
    with contextlib.suppress(OSError):  # another process does the same
        stats = {path: path.stat() for path in folder.glob("*-cache")}
        for path, stat in sorted(stats.items(), key=lambda kept: -max(kept[1].st_atime, kept[1].st_mtime)):
            room -= stat.st_size
            if room < 0:
                path.unlink(missing_ok=True)
    os.environ[name] = str(folder)
    # Else JAX keeps only what took a second, and the many small programs of a run take as long together.
    least = os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    if jax:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", float(least))


def cannot_write_cache(error: OSError) -> NanodlmError:
    """Return the error, in one line, of a cache that cannot be written."""
    remedy = "set NANODLM_CACHE to a folder with room"
    return NanodlmError(f"cannot write to the cache {cache_dir()}: {one_line(error)}; {remedy}")


def hold(name: str, needed: int = 0) -> Path:
    """Return a folder of this process, which goes with it, and make room for the bytes `needed`."""
    own = cache_dir() / "processes" / this_process()
    try:
        if not own.is_dir():
            own.mkdir(parents=True, exist_ok=True)
            # Not when a process ends that forked from it.
            atexit.register(lambda: own.name == this_process() and shutil.rmtree(own, ignore_errors=True))
        (own / name).mkdir(exist_ok=True)
        os.utime(own)
        _make_room(needed)
    except OSError as error:
        raise cannot_write_cache(error) from error
    return own / name


def take(file: Json, target: Path, get: Callable[[Path], str]) -> None:
    """Make a local path a copy of a file, which `get` fetches to a path, returning its sha256, unless it is here."""
    copy = cache_dir() / "files" / file["sha256"]
    while not is_whole(target, file):
        with contextlib.ExitStack() as held:
            with contextlib.suppress(OSError, NotImplementedError):  # another fetches it, or no lock works here
                lock = cache_dir() / "locks" / file["sha256"][:2]
                held.enter_context(FileLock(lock, timeout=LOCK_SECONDS, fallback_to_soft=False))
            if not is_whole(copy, file):
                try:
                    with beside(copy) as arriving:
                        if get(arriving) != file["sha256"]:
                            raise Damaged(f"{file['path']} has been altered")
                        arriving.replace(copy)
                except FileNotFoundError as error:
                    if error.filename is None:  # else it is the cache that has gone meanwhile, not the store's file
                        raise
        with contextlib.suppress(FileNotFoundError):  # it was thrown out, or the whole cache was removed: again
            link(copy, target)
            os.utime(copy)
            return


def _make_room(needed: int) -> None:
    """Throw out what processes have left, then the oldest copies that nobody has linked, until `needed` bytes fit."""
    old, here = time.time() - OLD_SECONDS, this_process().partition(".")[0]
    for own in (cache_dir() / "processes").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if has_ended(own.name) or (not own.name.startswith(f"{here}.") and own.stat().st_mtime < old):
                shutil.rmtree(own, ignore_errors=True)
    copies, own_files = (list_files(str(cache_dir() / folder)) for folder in ("files", "processes"))
    total = sum(copy.size for copy in copies.values()) + sum(f.size for f in own_files.values() if f.links == 1)
    for name, copy in sorted(copies.items(), key=lambda copy: copy[1].changed):
        arriving = name.startswith(".")
        if (arriving and copy.changed < old) or (not arriving and copy.links == 1 and total + needed > limit()):
            (cache_dir() / "files" / name).unlink(missing_ok=True)
            total -= copy.size
    if needed and total + needed > limit():
        room = f"{limit() / 1e9:.3g} GB, of which {total / 1e9:.3g} are in use, and {needed / 1e9:.3g} more are needed"
        raise NanodlmError(f"the cache {cache_dir()} may hold {room}: raise NANODLM_CACHE_GB")
