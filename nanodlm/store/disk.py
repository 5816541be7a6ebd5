"""Files on local disk: hashed, flushed, listed, and written whole or not at all."""

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanodlm.store.manifest import Json


@dataclass
class Found:
    """A file that a listing shows."""

    size: int
    changed: float  # Unix time, by the storage's clock
    e_tag: str = ""  # differs when the content does, where a bucket tells it


class OnDisk(Found):
    """A file on a local disk, which is asked for its state when that is needed; what went since changed just now."""

    links: int  # names that it has

    def __init__(self, entry: os.DirEntry[str]):
        self._entry = entry

    def __getattr__(self, name: str) -> Any:
        self.size, self.changed, self.links = 0, time.time(), 0
        with contextlib.suppress(FileNotFoundError):
            status = self._entry.stat(follow_symlinks=False)
            self.size, self.changed, self.links = status.st_size, status.st_mtime, status.st_nlink
        return object.__getattribute__(self, name)


@contextlib.contextmanager
def beside(target: Path) -> Iterator[Path]:
    """Yield a name for what is to be renamed to a target once it is whole; what is left there goes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        yield new
    finally:
        new.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a local file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(folder: Path, name: str) -> Json:
    """Return what a manifest says of a file: its path below the folder, its size and its sha256; it is flushed."""
    with (folder / name).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return {"path": name, "size": os.fstat(file.fileno()).st_size, "sha256": sha256}


def flush_folders(files: Iterable[Path], root: Path) -> None:
    """Let the names of files, whose content was flushed, outlive a power cut: in their folders up to `root`."""
    below = {folder for path in {file.parent for file in files} for folder in (path, *path.parents)}
    for folder in sorted((folder for folder in below if folder.is_relative_to(root)), reverse=True):
        with contextlib.suppress(OSError):  # not every network's disk knows this of folders
            opened = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(opened)
            finally:
                os.close(opened)


def is_whole(path: Path, file: Json) -> bool:
    """Say if a local file, which is no link, has the size and the sha256 that a manifest gives it."""
    with contextlib.suppress(OSError):
        status = path.lstat()
        return stat.S_ISREG(status.st_mode) and status.st_size == file["size"] and sha256_of(path) == file["sha256"]
    return False


def link(source: Path, target: Path) -> None:
    """Make another name of a file, which will not change, or a copy where the disk has no such names."""
    try:
        os.link(source, target)
    except FileExistsError:
        target.unlink(missing_ok=True)
        link(source, target)
    except FileNotFoundError:
        if not source.exists():
            raise
        target.parent.mkdir(parents=True, exist_ok=True)
        link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())


def list_files(folder: str) -> dict[str, OnDisk]:
    """Return all files and links below a local folder, by relative path; a folder that cannot be listed raises."""
    found: dict[str, OnDisk] = {}
    folders = [""]
    while folders:
        below = folders.pop()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(f"{folder}/{below}") as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{below}{entry.name}/")
                else:
                    found[below + entry.name] = OnDisk(entry)
    return found


def write_whole(target: Path, data: bytes, create_only: bool = False) -> bool:
    """Make a local file appear whole in the place of an old one; or only where there is none, else return False."""
    with beside(target) as new:
        with new.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            if create_only:
                os.link(new, target)
            else:
                new.replace(target)
        except FileExistsError:  # which a network's disk may say of a link that it has made
            return target.exists() and new.samefile(target)
    flush_folders([target], target.parent.parent)
    return True


class Disk:
    """The local disk as a storage; `Bucket` and `Driver` have the same methods, of which `Storage` tells."""

    def read(self, path: str, limit: int) -> bytes:
        """Return the content of a file; a `ValueError` says that it has more bytes than this, or is no file."""
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # it may be a pipe
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
                raise ValueError("is no regular file" if status.st_size <= limit else f"has {status.st_size} bytes")
            return file.read()

    def files(self, folder: str) -> dict[str, Found]:
        return dict(list_files(folder))

    def write(self, path: str, data: bytes, create_only: bool = False) -> bool:
        """Write a file whole; with `create_only` change nothing where there is one: return False, or raise."""
        return write_whole(Path(path), data, create_only)

    def get(self, path: str, target: Path, size: int) -> str:
        return sha256_of(Path(path))  # it is used where it lies

    def put(self, source: Path, path: str) -> tuple[str, str]:
        """Copy a file here, and return the sha256 of what was sent, and the e-tag that it has there."""
        with beside(Path(path)) as new:
            shutil.copyfile(source, new)
            sha256 = describe(new.parent, new.name)["sha256"]
            new.replace(path)
        return sha256, ""

    def remove(self, *paths: str) -> None:
        for path in paths:
            with contextlib.suppress(IsADirectoryError):
                Path(path).unlink(missing_ok=True)

    def remove_folder(self, folder: str) -> None:
        try:
            shutil.rmtree(folder)
        except OSError as error:  # what is open on a network's disk stays under another name until then
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENOTEMPTY, errno.EBUSY):
                raise
