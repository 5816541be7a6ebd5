"""Files below one URL: local disk, a bucket, or whatever else fsspec can create a file only once on.

Every request of the store goes through here: what may pass by itself (503, a time-out, a reset connection) is tried
again for `$NANODLM_RETRY_SECONDS`, what will not (no access, no such bucket, disk full) is one clear line at once.
"""

import contextlib
import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import orjson

from nanodlm.config import refuse_secrets
from nanodlm.config.addresses import single_slashes
from nanodlm.errors import Damaged, Emit, NanodlmError, UsageError, silent
from nanodlm.store.bucket import Bucket, Driver
from nanodlm.store.disk import Disk, Found
from nanodlm.store.manifest import Json, record_text
from nanodlm.store.retry import ask, one_line

S = TypeVar("S")
T = TypeVar("T")
PROBES = ".probes"  # the folder of files that try what a storage does
REQUESTS = 16  # at once
RECORD = 1 << 26  # bytes that a manifest or another record may have
LOCAL, S3 = {"file", "local"}, {"s3", "s3a"}
# Whose drivers send a creation as one conditional request; `Storage.require_create_only` tries if the server heeds it.
CREATE_ONLY = {*LOCAL, *S3, "gs", "gcs", "memory"}


class Storage:
    """Files below one URL, whose path is `root`. `emit` is told how far transfers are."""

    emit: Emit = staticmethod(silent)

    def __init__(self, url: str):
        """Connect; nothing is created or asked yet. A `UsageError` says why no store can be at a URL."""
        if problem := _problem_with(refuse_secrets(url)):
            raise UsageError(f"cannot open the store {url}: {problem}")
        protocol = url.partition("://")[0] if "://" in url else "file"
        if protocol not in LOCAL:  # one place has one address
            url = single_slashes(url).rstrip("/")
        self._create_only = self.is_local = protocol in LOCAL
        self.driver: Disk | Bucket | Driver
        try:
            if self.is_local:
                folder = Path(url.rpartition("://")[2]).expanduser()
                self.root, self._before, self.driver = str(folder.absolute()), "", Disk()
            elif protocol in S3:
                self.root, self._before = url.partition("://")[2].lstrip("/"), "s3://"
                self.driver = Bucket(self.root.partition("/")[0])
            else:
                from fsspec import url_to_fs

                fs, root = url_to_fs(url, use_listings_cache=False)
                self.root, self.driver = root.rstrip("/"), Driver(fs)
                self._before = fs.unstrip_protocol(self.root).removesuffix(self.root)
        except (ImportError, ValueError) as error:
            missing = f"; pip install -c constraints.txt -e '.[{'s3' if protocol in S3 else 'gcs'}]'"
            missing = missing if isinstance(error, ImportError) else ""
            raise UsageError(f"cannot open the store {url}: {error}{missing}") from error

    def path(self, *parts: str) -> str:
        """Return a path below the root, for the other methods."""
        return "/".join((self.root, *parts))

    def uri(self, *parts: str) -> str:
        """Return the address of a path below the root: a plain path on local disk, else a URL."""
        return self.address(self.path(*parts))

    def address(self, path: str) -> str:
        """Return the address of a path: itself on local disk, else a URL."""
        return self._before + path

    def ask(self, call: Callable[[], T]) -> T:
        """Return the result of a request, as `retry.ask` does."""
        return ask(self.uri(), call)

    def together(self, call: Callable[[S], T], things: Iterable[S]) -> Iterator[T]:
        """Yield what a call that asks the storage returns of each thing, in order; several are under way at once."""
        with ThreadPoolExecutor(REQUESTS, thread_name_prefix="storage") as pool:
            yield from pool.map(call, things)

    def read_json(self, path: str) -> Any:
        """Return a record, or None where there is no file. What cannot be read or is no JSON raises `Damaged`."""
        try:
            data = self.driver.read(path, RECORD) if self.is_local else self.ask(lambda: self.driver.read(path, RECORD))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:
            raise Damaged(f"{path} {error}") from error
        except OSError as error:
            raise Damaged(f"{path} cannot be read: {one_line(error)}") from error
        try:
            if (value := orjson.loads(data)) is None:
                raise ValueError
        except ValueError:
            raise Damaged(f"{path} holds no record") from None
        return value

    def files(self, folder: str) -> dict[str, Found]:
        """Return all files below a folder, by relative path; none where there is no folder."""
        try:
            return self.driver.files(folder) if self.is_local else self.ask(lambda: self.driver.files(folder))
        except OSError as error:
            reason = "there is no such bucket" if isinstance(error, FileNotFoundError) else one_line(error)
            raise NanodlmError(f"cannot list {self.uri()}: {reason}") from error

    def get(self, path: str, target: Path, size: int) -> str:
        """Copy a file of this size to a local path, and return the sha256 of what arrived, to be compared."""
        return self.ask(lambda: self.driver.get(path, target, size))

    def put(self, pairs: list[tuple[Path, str]], done: Callable[[int], None]) -> list[Json]:
        """Copy local files to paths here, several at a time, telling `done` the bytes; return size, sha256, e-tag."""
        sent, put = [], self.together(lambda pair: self.ask(lambda: self.driver.put(*pair)), pairs)
        for (source, _), (sha256, e_tag) in zip(pairs, put, strict=True):
            size = source.stat().st_size
            done(size)
            sent.append({"size": size, "sha256": sha256, "e_tag": e_tag})
        return sent

    def write_json(self, path: str, value: Any, *, create_only: bool = False) -> bool:
        """Write a file whole. With `create_only` return False, changing nothing, when it exists.

        A creation whose acknowledgement was lost counts as one, whoever repeats it: the file then holds what was to be
        written. So no two writers may create the same content at one path.
        """
        data = record_text(value)

        def call() -> bool:
            try:
                if self.driver.write(path, data, create_only):
                    return True
            except FileExistsError:
                if self.is_local:  # a file is where a folder should be
                    raise
            with contextlib.suppress(FileNotFoundError, ValueError):  # it has been removed since, or is longer
                return not self.is_local and self.driver.read(path, len(data)) == data
            return False

        return self.ask(call)

    def require_create_only(self) -> None:
        """Try, once, whether a file that exists can be created again, and refuse a storage where it can."""
        if not self._create_only:
            with self.beginning():
                self.now()

    @contextlib.contextmanager
    def beginning(self) -> Iterator[None]:
        """Turn what the first write raises of a storage that cannot be written into one line."""
        try:
            yield
        except OSError as error:
            no_bucket = isinstance(error, FileNotFoundError) and not self.is_local
            reason = "there is no such bucket" if no_bucket else error.strerror or error
            remedy = "choose another with --store, or mend its permissions"
            raise NanodlmError(f"cannot write to the store {self.uri()}: {reason}; {remedy}") from error

    def now(self) -> float:
        """Return the Unix time by the storage's own clock: that of a file created now, which must be so only once."""
        folder = self.path(PROBES, secrets.token_hex(8))
        try:
            self.write_json(f"{folder}/probe", {"created": 1}, create_only=True)
            if self.write_json(f"{folder}/probe", {"created": 2}, create_only=True):
                what = f"{self.uri()} lets an existing file be created again, so commits of two runs could mix"
                raise NanodlmError(f"{what}: its server ignores `If-None-Match`; use another store")
            self._create_only = True
            return self.files(folder)["probe"].changed
        finally:
            with contextlib.suppress(OSError, NanodlmError):
                self.remove_folder(folder)

    def remove(self, *paths: str) -> None:
        """Remove files; those that are not there are no error."""
        self.ask(lambda: self.driver.remove(*paths))

    def remove_folder(self, folder: str) -> None:
        """Remove all below a folder, and it."""
        self.ask(lambda: self.driver.remove_folder(folder))


def _problem_with(url: str) -> str:
    """Say why no store can be at a URL; an empty text when one can."""
    if not url:
        return "it has no name: give a folder, or a bucket at s3:// or gs://"
    word, colon, rest = url.partition(":")
    if not colon:
        return ""
    import fsspec

    known = fsspec.available_protocols()
    if not rest.startswith((":", "//")) and word in known:
        return f"write {word}://{rest if word in LOCAL else rest.lstrip('/')}, or ./{url} for a folder"
    protocol = fsspec.core.split_protocol(url)[0] or "file"
    if "::" in url or protocol not in CREATE_ONLY:
        problem = "cannot create a file only once, which commits rely on" if protocol in known else "is not known"
        return f"{protocol}:// {problem}; use a folder, or a bucket at s3:// or gs://"
    if protocol in {*S3, "gs", "gcs"} and not url.partition("://")[2].split("/")[0]:
        return "it names no bucket"  # a stage would be taken for one
    if protocol not in LOCAL and any(sign in url for sign in "*?["):
        return "its prefix must not hold *, ? or [, which stand for others"
    return ""


def show_transfer(emit: Emit, unit: str, files: list[Json]) -> Callable[[int], None]:
    """Return what to call with numbers of bytes that have arrived, so that `emit` is called with progress in MB."""
    done, total = 0, sum(file["size"] for file in files)

    def arrived(size: int) -> None:
        nonlocal done
        done += size
        emit("progress", done=done / 1e6, total=total / 1e6, unit=unit)

    return arrived
