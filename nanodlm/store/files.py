"""Files below one URL: local disk, or any fsspec file system that can create a file only once.

Every request of the store goes through here: what may pass by itself (503, a time-out, a reset connection) is tried
again for `$NANODLM_RETRY_SECONDS`, what will not (no access, no such bucket, disk full) is one clear line at once.
"""

import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from nanodlm.config import refuse_secrets
from nanodlm.errors import Emit, NanodlmError, UsageError
from nanodlm.store.disk import Found, list_files, write_whole
from nanodlm.store.manifest import Json
from nanodlm.store.retry import ask, one_line, says_it_exists

T = TypeVar("T")
TRANSFERS = 32  # files on their way at once
# Whose drivers send a creation as one conditional request; `Storage.require_create_only` tries if the server heeds it.
CREATE_ONLY = {"file", "local", "s3", "s3a", "gs", "gcs", "memory"}


class Storage:
    """Files below one URL, which is the path `root` on fsspec's file system `fs`."""

    def __init__(self, url: str):
        """Connect; nothing is created or asked yet. A `UsageError` says why no store can be at a URL."""
        if problem := _problem_with(refuse_secrets(url)):
            raise UsageError(f"cannot open the store {url}: {problem}")
        try:
            self.fs, root = fsspec.url_to_fs(url, use_listings_cache=False)
        except (ValueError, ImportError) as error:
            raise UsageError(f"cannot open the store {url}: {error}") from error
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self.root = str(Path(root).absolute()) if self.is_local else root.rstrip("/")
        self._create_only = self.is_local

    def path(self, *parts: str) -> str:
        """Return a path below the root, for the file system's own calls."""
        return "/".join((self.root, *parts))

    def uri(self, *parts: str) -> str:
        """Return the address of a path below the root: a plain path on local disk, else a URL."""
        return self.path(*parts) if self.is_local else self.fs.unstrip_protocol(self.path(*parts))

    def patiently(self, call: Callable[[], T]) -> T:
        """Return the result of a request, made again while it fails for a reason that may pass; see `retry.ask`."""
        return ask(self.uri(), call)

    def read(self, path: str) -> bytes:
        """Return the content of a file."""
        return self.patiently(lambda: self.fs.cat_file(path))

    def read_json(self, path: str) -> Any:
        """Return parsed content, None where there is no file, and the empty string where it is not JSON, or null."""
        try:
            value = json.loads(self.read(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError:
            return ""
        return "" if value is None else value

    def files(self, folder: str) -> dict[str, Found]:
        """Return all files below a folder, by relative path; none where there is no folder."""
        if self.is_local:
            return self.patiently(lambda: list_files(folder))
        try:
            found: Json = self.patiently(lambda: self.fs.find(folder, detail=True))
        except FileNotFoundError:
            return {}
        prefix = f"{folder.strip('/')}/".lstrip("/")
        return {
            path.lstrip("/").removeprefix(prefix): Found(int(info["size"]), _changed(info))
            for path, info in found.items()
            if path.lstrip("/").startswith(prefix) and not path.endswith("/")  # a console's mark of a folder
        }

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the sizes in bytes of all files below a folder, by relative path."""
        return {path: found.size for path, found in self.files(folder).items()}

    def sha256(self, path: str) -> str:
        """Return the sha256 of a file, in hex."""

        def call() -> str:
            with self.fs.open(path, "rb", **({} if self.is_local else {"cache_type": "readahead"})) as file:
                return hashlib.file_digest(file, "sha256").hexdigest()

        return self.patiently(call)

    def get(self, pairs: list[tuple[str, Path]]) -> None:
        """Copy files to local paths, several at a time; what is cut off leaves half a file, so compare them."""
        for sources, targets in _batches(pairs):
            self.patiently(partial(self.fs.get, sources, targets))

    def put(self, pairs: list[tuple[Path, str]], done: Callable[[int], None] = lambda _: None) -> None:
        """Copy local files to paths here, several at a time; `done` is called with numbers of bytes that arrived."""
        for sources, targets in _batches(pairs):
            for target in targets if self.is_local else ():
                Path(target).parent.mkdir(parents=True, exist_ok=True)
            self.patiently(partial(self.fs.put, sources, targets))
            done(sum(os.path.getsize(source) for source in sources))

    def copy(self, pairs: list[tuple[str, str]]) -> None:
        """Copy files here to other paths here, several at a time; a bucket's server does it without sending them."""
        for sources, targets in _batches(pairs):
            self.patiently(partial(self.fs.copy, sources, targets))

    def write_json(self, path: str, value: Any, *, create_only: bool = False) -> bool:
        """Write a file whole. With `create_only` return False, changing nothing, when it exists.

        A creation whose acknowledgement was lost counts as one, whoever repeats it: the file then holds what was to be
        written. So no two writers may create the same content at one path.
        """
        data = json.dumps(value, indent=1, sort_keys=True).encode()
        if self.is_local:
            return write_whole(Path(path), data, create_only)

        def call() -> bool:
            try:
                self.fs.pipe_file(path, data, mode="create" if create_only else "overwrite")
            except OSError as error:
                if not (isinstance(error, FileExistsError) or says_it_exists(error)):
                    raise
                with contextlib.suppress(FileNotFoundError):  # it has been removed since
                    return self.read(path) == data
                return False
            return True

        return self.patiently(call)

    def require_create_only(self) -> None:
        """Try, once, whether a file that exists can be created again, and refuse a storage where it can."""
        if self._create_only:
            return
        with self._probe() as probe:
            if self.write_json(probe, {"created": 2}, create_only=True):
                what = f"{self.uri()} lets an existing file be created again, so commits of two runs could mix"
                raise NanodlmError(f"{what}: its server ignores `If-None-Match`; use another store")
            self._create_only = True

    def now(self) -> float:
        """Return the Unix time by the storage's own clock: that of a file created now."""
        try:
            with self._probe() as probe:
                return _changed(self.patiently(lambda: self.fs.info(probe)))
        except OSError as error:
            raise NanodlmError(f"cannot write to {self.uri()}: {one_line(error)}") from error

    @contextlib.contextmanager
    def _probe(self) -> Iterator[str]:
        """Create a file, yield its path, and remove it."""
        path = self.path(f".probe-{secrets.token_hex(8)}")
        try:
            self.write_json(path, {"created": 1}, create_only=True)
            yield path
        finally:
            with contextlib.suppress(OSError, NanodlmError):
                self.remove(path)

    def remove(self, *paths: str) -> None:
        """Remove files; those that are not there are no error."""
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                self.patiently(partial(self.fs.rm_file, path))

    def remove_folder(self, folder: str) -> None:
        """Remove all below a folder, and it."""
        with contextlib.suppress(FileNotFoundError):
            self.patiently(lambda: self.fs.rm(folder, recursive=True))


def _batches(pairs: Sequence[tuple[str | Path, str | Path]]) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the sources and targets of as many transfers as may go on at once."""
    for i in range(0, len(pairs), TRANSFERS):
        batch = pairs[i : i + TRANSFERS]
        yield [str(source) for source, _ in batch], [str(target) for _, target in batch]


def _problem_with(url: str) -> str:
    """Say why no store can be at a URL; an empty text when one can."""
    if not url:
        return "it has no name: give a folder, or a bucket at s3:// or gs://"
    known = fsspec.available_protocols()
    word, colon, rest = url.partition(":")
    if colon and not rest.startswith((":", "//")) and word in known:
        return f"write {word}://{rest if word in ('file', 'local') else rest.lstrip('/')}, or ./{url} for a folder"
    protocol = fsspec.core.split_protocol(url)[0] or "file"
    if "::" in url or protocol not in CREATE_ONLY:
        problem = "cannot create a file only once, which commits rely on" if protocol in known else "is not known"
        return f"{protocol}:// {problem}; use a folder, or a bucket at s3:// or gs://"
    if protocol in ("s3", "s3a", "gs", "gcs") and not url.partition("://")[2].split("/")[0]:
        return "it names no bucket"  # a stage would be taken for one
    if protocol not in ("file", "local") and any(sign in url for sign in "*?["):
        return "its prefix must not hold *, ? or [, which stand for others"
    return ""


def _changed(info: Json) -> float:
    """Return when a file last changed, as a Unix time; drivers name it differently."""
    names = ("mtime", "LastModified", "updated", "created")
    value = next((info[name] for name in names if info.get(name)), time.time())
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    return value.timestamp() if isinstance(value, datetime) else float(value)


def show_transfer(emit: Emit, unit: str, files: list[Json]) -> Callable[[int], None]:
    """Return what to call with numbers of bytes that have arrived, so that `emit` is called with progress in MB."""
    done, total = 0, sum(file["size"] for file in files)

    def arrived(size: int) -> None:
        nonlocal done
        done += size
        emit("progress", done=done / 1e6, total=total / 1e6, unit=unit)

    return arrived
