"""Files below one URL: local disk, or any fsspec file system that can create a file only once.

Every request of the store goes through here: what may pass by itself (503, a time-out, a reset connection) is tried
again for `$NANODLM_RETRY_SECONDS`, what will not (no access, no such bucket, disk full) is one clear line at once.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from nanodlm.config import refuse_secrets
from nanodlm.errors import NanodlmError, Unreachable, UsageError
from nanodlm.store.disk import TRANSFERS, Found, _each, _local_files, _replace, _write_local
from nanodlm.store.retry import FIRST_PAUSE, LONGEST_PAUSE, _exists, _may_pass, _patience, _refused, _text, log

T = TypeVar("T")
# Protocols whose fsspec drivers send a creation as one conditional request. A server may still ignore the condition:
# `Storage.require_create_only` tries it.
CREATE_ONLY = {"file", "local", "s3", "s3a", "gs", "gcs", "memory"}


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
