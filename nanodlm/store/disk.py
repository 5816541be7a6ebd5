"""Files on local disk: hashing, listing, and writing them whole or not at all."""

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRANSFERS = 32  # files on their way at once


@dataclass(frozen=True)
class Found:
    """A file that a listing shows."""

    size: int
    changed: float  # Unix time, by the storage's clock


def sha256_of(path: Path) -> str:
    """sha256 of a local file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _local_files(folder: str) -> dict[str, Found]:
    """All files and links below a local folder; fsspec would leave out the folders that it could not list."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    found = {}
    for base, folders, names in os.walk(folder, onerror=refuse):
        for path in (os.path.join(base, name) for name in (*names, *folders)):
            try:
                info = os.lstat(path)
                if stat.S_ISDIR(info.st_mode):
                    continue
                size = os.stat(path).st_size if os.path.exists(path) else 0  # of what a link leads to
            except FileNotFoundError:  # it has been removed since
                continue
            found[Path(path).relative_to(folder).as_posix()] = Found(size, info.st_mtime)
    return found


def _each(call: Callable[..., None], arguments: Iterable[tuple[Any, ...]]) -> None:
    """Make several calls at a time; after the first that fails begin no more, and raise its error."""
    todo = list(arguments)
    if len(todo) < 2:
        for words in todo:
            call(*words)
        return
    with ThreadPoolExecutor(min(TRANSFERS, len(todo)), thread_name_prefix="transfers") as pool:
        running = [pool.submit(call, *words) for words in todo]
        try:
            for future in running:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _write_local(target: Path, data: bytes, create_only: bool) -> bool:
    def fill(path: Path) -> None:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    return _replace(target, fill, create_only)


def _replace(target: Path, fill: Callable[[Path], Any], create_only: bool = False) -> bool:
    """Make a local file appear whole, in the place of an old one, or only where there is none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".", delete=False) as file:
        path = Path(file.name)
    try:
        path.chmod(0o644)  # a store is shared
        fill(path)
        if create_only:
            os.link(path, target)
        else:
            path.replace(target)
    except FileExistsError:  # which a network's disk may say of a link that it has made
        return target.exists() and path.samefile(target)
    finally:
        path.unlink(missing_ok=True)
    return True
