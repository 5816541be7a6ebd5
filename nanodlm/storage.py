"""Files below one URL: local disk, or any fsspec file system that can create a file only once.

Every request of the store goes through here: what may pass by itself (503, a time-out, a reset connection) is tried
again for `$NANODLM_RETRY_SECONDS`, what will not (no access, no such bucket, disk full) is one clear line at once.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import random
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from nanodlm.config import refuse_secrets
from nanodlm.errors import NanodlmError, Unreachable, UsageError

T = TypeVar("T")
log = logging.getLogger(__name__)
RETRY_SECONDS = 300.0  # for how long what may pass by itself is tried again
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 15.0  # seconds between tries; each is twice the last, and shortened at random
_most: ContextVar[float] = ContextVar("most", default=float("inf"))  # see `briefly`
TRANSFERS = 32  # files on their way at once
# Protocols whose fsspec drivers send a creation as one conditional request. A server may still ignore the condition:
# `Storage.require_create_only` tries it.
CREATE_ONLY = {"file", "local", "s3", "s3a", "gs", "gcs", "memory"}
PASSING_CODES = {408, 409, 425, 429, 499, 500, 502, 503, 504}
# Numbers stand alone: fingerprints in paths hold any digits.
PASSING_WORDS = re.compile(r"SlowDown|ServiceUnavailable|InternalError|RequestTimeout|Throttling|\b50[234]\b")
# Names, not classes: the drivers that define them need not be installed.
PASSING_CLASSES = {
    "ClientError",  # aiohttp's; botocore's of that name is told apart by its code below
    "ClientConnectionError", "ClientOSError", "ClientPayloadError", "ConnectionClosedError", "ConnectTimeoutError",
    "EndpointConnectionError", "HTTPClientError", "IncompleteRead", "IncompleteReadError", "ProxyError",
    "ReadTimeoutError", "ResponseParserError", "ResponseStreamingError", "ServerDisconnectedError", "ChecksumError",
    "FSTimeoutError", "ServerTimeoutError",
}  # fmt: skip
PASSING_ERRNOS = {
    errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH,
    errno.EBUSY, errno.EAGAIN, getattr(errno, "EREMOTEIO", errno.EAGAIN),  # macOS has no such error
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """A file that a listing shows."""

    size: int
    changed: float  # Unix time, by the storage's clock


class Storage:
    """Files below one URL.

    Attributes:
        fs: fsspec's file system, for what is not asked here.
        root: Path of the URL on it, without a slash at the end.
        is_local: Whether that is this machine's disk.
    """

    def __init__(self, url: str):
        """Connect; nothing is created or asked yet.

        Raises:
            UsageError: When the protocol is unknown, its driver is not installed, or it cannot create a file only
                once; or when the URL holds secrets, or signs that drivers take for patterns.
        """
        protocol = fsspec.core.split_protocol(refuse_secrets(url))[0] or "file"
        if not url:
            raise UsageError("cannot open a store without a name: give a folder, or a bucket at s3:// or gs://")
        word, colon, rest = url.partition(":")
        if colon and not rest.startswith((":", "//")) and word in fsspec.available_protocols():
            right = f"{word}://{rest if word in ('file', 'local') else rest.lstrip('/')}"
            raise UsageError(f"cannot open the store {url}: write {right}, or ./{url} for a folder")
        if "::" in url or protocol not in CREATE_ONLY:
            known = protocol in fsspec.available_protocols()
            problem = "cannot create a file only once, which commits rely on" if known else "is not known"
            raise UsageError(
                f"cannot open the store {url}: {protocol}:// {problem}; use a folder, or a bucket at s3:// or gs://"
            )
        if protocol in ("s3", "s3a", "gs", "gcs") and not url.partition("://")[2].split("/")[0]:
            raise UsageError(f"cannot open the store {url}: it names no bucket")  # a stage would pass for one
        if protocol not in ("file", "local") and any(sign in url for sign in "*?["):
            raise UsageError(f"cannot open the store {url}: its prefix must not hold *, ? or [, which stand for others")
        try:
            self.fs, root = fsspec.url_to_fs(url, use_listings_cache=False)
        except (ValueError, ImportError) as error:
            raise UsageError(f"cannot open the store {url}: {error}") from error
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self.root = str(Path(root).absolute()) if self.is_local else root.rstrip("/")
        self._create_only = self.is_local

    def path(self, *parts: str) -> str:
        """Path below the root, for the file system's own calls."""
        return "/".join((self.root, *parts))

    def uri(self, *parts: str) -> str:
        """Address of a path below the root: a plain path on local disk, else a URL."""
        return self.path(*parts) if self.is_local else self.fs.unstrip_protocol(self.path(*parts))

    def patiently(self, call: Callable[[], T]) -> T:
        """The result of a call, made again while it fails for a reason that may pass.

        Raises:
            Unreachable: When it still does after `$NANODLM_RETRY_SECONDS` (300).
            NanodlmError: When access is refused.
            OSError: For what the caller knows best: FileNotFoundError, FileExistsError, and others that stay.
        """
        deadline = time.monotonic() + _patience()
        pause, told = FIRST_PAUSE, False
        while True:
            try:
                return call()
            except (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, NanodlmError):
                raise
            except Exception as error:
                if _refused(error):
                    raise NanodlmError(
                        f"{self.uri()} refuses access: {_text(error)}; mend the credentials in the environment, or "
                        "the permissions, or choose another --store"
                    ) from error
                if not _may_pass(error):
                    raise
                if time.monotonic() + pause > deadline:
                    raise Unreachable(
                        f"{self.uri()} does not answer: {_text(error)}; what is finished is kept, run again to continue"
                    ) from error
                if pause > 1 and not told:
                    told = True
                    log.warning("%s does not answer (%s): trying again", self.uri(), _text(error))
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE)

    # Reading

    def read(self, path: str) -> bytes:
        """A whole file.

        Raises:
            FileNotFoundError: When there is none.
        """
        return self.patiently(lambda: self.fs.cat_file(path))

    def read_json(self, path: str) -> Any:
        """Parsed content, None where there is no file, and the empty string where it is not JSON, or null."""
        try:
            value = json.loads(self.read(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError:
            return ""
        return "" if value is None else value

    def files(self, folder: str) -> dict[str, Found]:
        """All files below a folder, by relative path; none where there is no folder."""
        if self.is_local:
            return self.patiently(lambda: _local_files(folder))
        try:
            found: dict[str, Any] = self.patiently(lambda: self.fs.find(folder, detail=True))
        except FileNotFoundError:
            return {}
        prefix = f"{folder.strip('/')}/".lstrip("/")
        return {
            path.lstrip("/").removeprefix(prefix): Found(int(info["size"]), _changed(info))
            for path, info in found.items()
            if path.lstrip("/").startswith(prefix) and not path.endswith("/")  # a console's mark of a folder
        }

    def sizes(self, folder: str) -> dict[str, int]:
        """Sizes in bytes of all files below a folder, by relative path."""
        return {path: found.size for path, found in self.files(folder).items()}

    def sha256(self, path: str) -> str:
        """sha256 of a file, in hex."""

        def call() -> str:
            with self.fs.open(path, "rb", **({} if self.is_local else {"cache_type": "readahead"})) as file:
                return hashlib.file_digest(file, "sha256").hexdigest()

        return self.patiently(call)

    def get(self, pairs: list[tuple[str, Path]]) -> None:
        """Copy files to local paths, several at a time; none of them is at its path before all of a few are whole.

        Raises:
            FileNotFoundError: When one is not there.
        """
        for i in range(0, len(pairs), TRANSFERS):
            sources = [source for source, _ in pairs[i : i + TRANSFERS]]
            targets = [target for _, target in pairs[i : i + TRANSFERS]]
            unique = f"{os.getpid()}-{random.getrandbits(32):08x}.partial"
            partials = [target.with_name(f".{target.name}.{unique}") for target in targets]
            for target in targets:
                target.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.patiently(partial(self.fs.get, sources, [str(path) for path in partials]))
                for path, target in zip(partials, targets, strict=True):
                    path.replace(target)
            finally:
                for path in partials:
                    path.unlink(missing_ok=True)

    # Writing

    def put(self, pairs: list[tuple[Path, str]], done: Callable[[int], None] = lambda _: None) -> None:
        """Copy local files to paths here, several at a time; one that is there already is replaced.

        Args:
            pairs: Local path and path here of each.
            done: Told bytes that have arrived.
        """
        for i in range(0, len(pairs), TRANSFERS):
            batch = pairs[i : i + TRANSFERS]
            if self.is_local:
                for source, target in batch:
                    _replace(Path(target), partial(shutil.copyfile, source))
            else:
                sources, targets = [str(source) for source, _ in batch], [target for _, target in batch]
                self.patiently(partial(self.fs.put, sources, targets))
            done(sum(source.stat().st_size for source, _ in batch))

    def copy(self, pairs: list[tuple[str, str]]) -> None:
        """Copy files here to other paths here, several at a time; a bucket's server does it without sending them.

        Raises:
            FileNotFoundError: When one is not there.
        """
        for i in range(0, len(pairs), TRANSFERS):
            sources, targets = map(list, zip(*pairs[i : i + TRANSFERS], strict=True))
            self.patiently(partial(self.fs.copy, sources, targets))

    def write_json(self, path: str, value: Any, *, create_only: bool = False) -> bool:
        """Write atomically. With `create_only` return False, changing nothing, when the file exists.

        A creation whose acknowledgement was lost counts as one, whether it is repeated here or by the driver: the file
        then holds what was to be written. So no two writers may create the same content at one path.
        """
        data = json.dumps(value, indent=1, sort_keys=True).encode()
        if self.is_local:
            return _write_local(Path(path), data, create_only)

        def call() -> bool:
            try:
                self.fs.pipe_file(path, data, mode="create" if create_only else "overwrite")
            except OSError as error:
                if not (isinstance(error, FileExistsError) or _exists(error)):
                    raise
                with contextlib.suppress(FileNotFoundError):  # it has been removed since
                    return self.read(path) == data
                return False
            return True

        return self.patiently(call)

    def require_create_only(self) -> None:
        """Try, once, whether a file that exists can be created again.

        Raises:
            NanodlmError: When it can: commits of two runs could then mix.
        """
        if self._create_only:
            return
        probe = self.path(f".create-only-{os.getpid()}-{random.getrandbits(32):08x}")
        try:
            self.write_json(probe, {"created": 1}, create_only=True)
            if self.write_json(probe, {"created": 2}, create_only=True):
                raise NanodlmError(
                    f"{self.uri()} lets an existing file be created again, so commits of two runs could mix: its "
                    "server ignores `If-None-Match`; use another store"
                )
            self._create_only = True
        finally:
            with contextlib.suppress(OSError, NanodlmError):
                self.remove(probe)

    def now(self) -> float:
        """The time by the storage's own clock, a Unix time: that of a file written now.

        Raises:
            NanodlmError: When the storage cannot be written.
        """
        name = f".now-{os.getpid()}-{random.getrandbits(32):08x}"
        try:
            self.write_json(self.path(name), {})
            return _changed(self.patiently(lambda: self.fs.info(self.path(name))))
        except OSError as error:
            raise NanodlmError(f"cannot write to {self.uri()}: {_text(error)}") from error
        finally:
            with contextlib.suppress(OSError, NanodlmError):
                self.remove(self.path(name))

    def remove(self, *paths: str) -> None:
        """Remove files; those that are not there are no error."""

        def call(path: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                self.patiently(lambda: self.fs.rm_file(path))

        _each(call, ((path,) for path in paths))

    def remove_folder(self, folder: str) -> None:
        """Remove all below a folder, and it."""
        with contextlib.suppress(FileNotFoundError):
            self.patiently(lambda: self.fs.rm(folder, recursive=True))


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


# Errors, over all drivers


@contextlib.contextmanager
def briefly(seconds: float) -> Iterator[None]:
    """Try again for no longer than this, whatever is set: what is done here may as well fail."""
    token = _most.set(seconds)
    try:
        yield
    finally:
        _most.reset(token)


def _patience() -> float:
    """Seconds for which what may pass is tried again."""
    text = os.environ.get("NANODLM_RETRY_SECONDS") or str(RETRY_SECONDS)
    try:
        return min(float(text), _most.get())
    except ValueError:
        raise UsageError(f"NANODLM_RETRY_SECONDS must be a number of seconds, not {text!r}") from None


def _causes(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found and len(found) < 8:
        found.append(error)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return found


def _code(error: BaseException) -> int | None:
    """The HTTP status behind an error, where its driver tells."""
    response = getattr(error, "response", None)
    told = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    for value in (told, getattr(error, "code", None), getattr(error, "status", None)):
        if isinstance(value, int | str) and str(value).isdecimal():
            return int(value)
    return None


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    for cause in _causes(error):
        code = _code(cause)
        if code is not None:
            return code in PASSING_CODES
        if isinstance(cause, TimeoutError | ConnectionError) or type(cause).__name__ in PASSING_CLASSES:
            return True
        if isinstance(cause, OSError) and cause.errno in PASSING_ERRNOS:
            return True
    return PASSING_WORDS.search(str(error)) is not None


def _refused(error: BaseException) -> bool:
    """Whether asking again would be refused again for lack of rights."""
    if isinstance(error, PermissionError) or type(error).__name__ in ("NoCredentialsError", "RefreshError"):
        return True
    return any(_code(cause) in (401, 403) for cause in _causes(error)) or str(error).startswith("Forbidden")


def _exists(error: BaseException) -> bool:
    """Whether an error says that a file to be created was there already; SeaweedFS says it in its cause."""
    return any(_code(cause) == 412 or "PreconditionFailed" in f"{cause}" for cause in _causes(error))


def _text(error: BaseException) -> str:
    """One short line of an error."""
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())[:200]


def _changed(info: dict[str, Any]) -> float:
    """When a file last changed, as a Unix time; drivers name it differently."""
    for key in ("mtime", "LastModified", "updated", "created"):
        value = info.get(key)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, str):
            return datetime.fromisoformat(value).timestamp()
    return time.time()
