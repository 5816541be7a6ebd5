"""Files on local disk: hashing and comparing, listing, and writing them whole or not at all."""

import contextlib
import hashlib
import os
import stat
import tempfile
from pathlib import Path
from typing import NamedTuple

from nanodlm.store.manifest import Json


class Found(NamedTuple):
    """A file that a listing shows."""

    size: int
    changed: float  # Unix time, by the storage's clock


def sha256_of(path: Path) -> str:
    """Return the sha256 of a local file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(folder: Path, name: str) -> Json:
    """Return what a manifest says of a file: its path below the folder, its size and its sha256."""
    return {"path": name, "size": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}


def is_whole(path: Path, file: Json) -> bool:
    """Say if a local file has the size and the sha256 that a manifest gives it."""
    return path.is_file() and path.stat().st_size == file["size"] and sha256_of(path) == file["sha256"]


def is_within(folder: Path, path: Path) -> bool:
    """Say if a local path lies in a folder when links are followed."""
    return path.resolve().is_relative_to(folder.resolve())


def list_files(folder: str) -> dict[str, Found]:
    """Return all files and links below a local folder, by relative path; a folder that cannot be listed raises."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    found = {}
    for base, folders, names in os.walk(folder, onerror=refuse):
        for path in (os.path.join(base, name) for name in (*names, *folders)):
            with contextlib.suppress(FileNotFoundError):  # it has been removed since
                info = os.lstat(path)
                if not stat.S_ISDIR(info.st_mode):
                    size = os.stat(path).st_size if os.path.exists(path) else 0  # of what a link leads to
                    found[Path(path).relative_to(folder).as_posix()] = Found(size, info.st_mtime)
    return found


def write_whole(target: Path, data: bytes, create_only: bool = False) -> bool:
    """Make a local file appear whole in the place of an old one; or only where there is none, else return False."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".", delete=False) as file:
        path = Path(file.name)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    try:
        path.chmod(0o644)  # a store is shared
        if create_only:
            os.link(path, target)
        else:
            path.replace(target)
    except FileExistsError:  # which a network's disk may say of a link that it has made
        return target.exists() and path.samefile(target)
    finally:
        path.unlink(missing_ok=True)
    return True
