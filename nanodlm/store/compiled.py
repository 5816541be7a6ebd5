"""Programs that XLA has compiled, kept in `{cache}/compiled` for the next process that runs the same."""

import contextlib
import os
import sys
from pathlib import Path

from nanodlm.store.cache import cache_dir

MOST = 10**9  # bytes of them; an update of the demo takes 0.3 MB, and with all the small programs a run takes 1


def keep_compiled() -> None:
    """Let this process, and those that it starts, keep what they compile and find what others have kept.

    JAX finds a program by its code, its shapes, the versions of JAX and XLA and the instructions that the processor
    has, so machines of several kinds may share a home folder. `$JAX_COMPILATION_CACHE_DIR`, or that setting of JAX,
    names a folder of the user's own, which is left alone; empty, nothing is kept. What was read longest ago goes when a
    process begins. JAX's own bound looks at every kept program before each writing (50 µs each), needs locks, which
    some networks' disks lack, and after a kill between its two files of a program keeps none any more.
    """
    jax, name = sys.modules.get("jax"), "JAX_COMPILATION_CACHE_DIR"
    if (jax.config.jax_compilation_cache_dir if jax else os.environ.get(name)) is not None:
        return
    folder = cache_dir() / "compiled"
    with contextlib.suppress(OSError):  # another process does the same
        _make_room(folder)
    os.environ[name] = str(folder)
    # By default JAX keeps what took a second, and the many small programs of a run take as long together.
    least = os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    if jax:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", float(least))


def _make_room(folder: Path) -> None:
    kept = [(max(s.st_atime, s.st_mtime), s.st_size, path) for path in folder.glob("*-cache") for s in [path.stat()]]
    excess = sum(size for _, size, _ in kept) - MOST
    for _, size, path in sorted(kept):
        if excess <= 0:
            break
        path.unlink(missing_ok=True)
        excess -= size
