"""One try at building an artifact: its folder, its finished parts, and the commit."""

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nanodlm.errors import Damaged, Emit, NanodlmError, silent
from nanodlm.store.cache import drop, hold
from nanodlm.store.disk import describe, is_whole, is_within, list_files
from nanodlm.store.files import show_transfer
from nanodlm.store.manifest import FLOW_RUN, MANIFEST, PACKAGES, Json, digest_of, safe, sealed, utc_now
from nanodlm.store.part import finished_parts, read_part
from nanodlm.store.store import Artifact, Store


class Attempt:
    """One try at building an artifact: a local folder whose files become the artifact at `commit`."""

    def __init__(self, store: Store, stage: str, fingerprint: str, afresh: bool = False):
        self.store, self.stage, self.fingerprint, self.afresh = store, stage, fingerprint, afresh
        self.id = f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{secrets.token_hex(4)}"  # sorts by time
        self.started = time.monotonic()
        self._parts: dict[str, Json] = {}
        self.path = Path(self._remote()) if store.is_local else hold(f"attempt-{self.id}")
        self.path.mkdir(parents=True, exist_ok=not store.is_local)

    def _remote(self, *relative: str) -> str:
        return self.store.path(self.stage, self.fingerprint, "attempts", self.id, *relative)

    def finish(self, name: str, files: Iterable[str], **info: Any) -> None:
        """Record files (relative paths), which will not change any more, as a finished part, with JSON as `info`."""
        described = [describe(self.path, file) for file in sorted(files)]
        self._publish(described, silent)
        self._record(name, described, info)

    def _record(self, name: str, files: list[Json], info: Json) -> None:
        # It says whose it is, so that one in another's place is not taken for that.
        part = {"stage": self.stage, "fingerprint": self.fingerprint, "part": name, "files": files, "info": info}
        self.store.write_json(self._remote("parts", f"{name}.json"), sealed(part))
        self._parts[name] = part

    def _publish(self, files: list[Json], emit: Emit) -> None:
        """Copy files to the store, unless they are in it already because it is on this disk."""
        if not self.store.is_local:
            pairs = [(self.path / file["path"], self._remote(file["path"])) for file in files]
            self.store.put(pairs, show_transfer(emit, "MB published", files))

    def forget(self, name: str) -> None:
        """Drop a finished part and its files, here and in the store."""
        part = self._parts.pop(name)
        self.store.remove(self._remote("parts", f"{name}.json"))
        self._unlink(part["files"])
        if not self.store.is_local:
            self.store.remove(*(self._remote(file["path"]) for file in part["files"]))

    @cached_property
    def earlier(self) -> dict[str, list[str]]:
        """Names of the parts that earlier attempts finished, each with the attempts that did, newest first."""
        since = ""
        if self.afresh:
            artifact = self.store.find(self.stage, self.fingerprint)
            since = artifact.manifest["attempt"] if artifact else self.id
        return finished_parts(self.store, self.stage, self.fingerprint, since, but=self.id)

    def uri(self, name: str) -> str:
        """Return the address, in the store, of a file or folder of this attempt."""
        return self.store.uri(self.stage, self.fingerprint, "attempts", self.id, name)

    def info(self, name: str) -> Json | None:
        """Return what a part that an earlier attempt finished was finished with; its files are not looked at."""
        return next((part["info"] for _, part in self._earlier_parts(name)), None)

    def adopt(self, name: str) -> Json | None:
        """Take over a part that an earlier attempt finished and that is whole; return its `info`, or None: build it."""
        take = self._link if self.store.is_local else self._copy
        for base, part in self._earlier_parts(name):
            if take(base, part["files"]):
                self._record(name, part["files"], part["info"])
                return part["info"]
            self._unlink(part["files"])  # half a part must not be committed
        return None

    def _earlier_parts(self, name: str) -> Iterator[tuple[str, Json]]:
        """Yield the folders of earlier attempts that finished a part, and its records, newest first."""
        for attempt in self.earlier.get(name, ()):
            base = self.store.path(self.stage, self.fingerprint, "attempts", attempt)
            of = {"stage": self.stage, "fingerprint": self.fingerprint, "part": name}
            if part := read_part(self.store, f"{base}/parts/{name}.json", **of):
                yield base, part

    def _unlink(self, files: list[Json]) -> None:
        """Remove local files and the folders that this leaves empty."""
        for file in files:
            path = self.path / safe(file["path"])
            path.unlink(missing_ok=True)
            for folder in path.parents:
                if folder == self.path or not folder.is_dir() or any(folder.iterdir()):
                    break
                folder.rmdir()

    def _link(self, base: str, files: list[Json]) -> bool:
        """Take files of an earlier attempt on this disk over, and say if all of them are whole."""
        root = Path(self.store.path(self.stage, self.fingerprint))
        for file in files:
            source, target = Path(base, safe(file["path"])), self.path / file["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            if not is_within(root, source) or not source.is_file():
                return False
            try:
                os.link(source, target)  # finished files never change, so sharing them is safe
            except OSError:
                shutil.copyfile(source, target)
            if not is_whole(target, file):
                return False
        return True

    def _copy(self, base: str, files: list[Json]) -> bool:
        """Let the server copy files of an earlier attempt, and say if all copies, which are read, are whole."""
        copies = [(f"{base}/{safe(file['path'])}", self._remote(file["path"])) for file in files]
        with contextlib.suppress(FileNotFoundError):
            self.store.copy(copies)
            self.store.get([(copy, self.path / file["path"]) for (_, copy), file in zip(copies, files, strict=True)])
            if all(is_whole(self.path / file["path"], file) for file in files):
                return True
        self.store.remove(*(copy for _, copy in copies))
        return False

    def commit(
        self,
        *,
        identity: Json,
        metrics: Json,
        config: Json | None = None,
        code: Json | None = None,
        volatile: Iterable[str] = (),
        replace: bool = False,
    ) -> Artifact:
        """Publish every file of the folder, write the manifest, and return the artifact, or that of who was first.

        The fingerprint was made of the `identity`; `config` is the whole configuration, from which `verify --repair`
        builds it again, and `code` what `code_record` says. Files whose paths begin as one of `volatile` hold times or
        logs: verified like all others, but left out of the digest, because equal results may differ there. `replace`
        (an explicit rebuild) puts this in the place of an existing manifest whose digest differs.
        """
        known = {file["path"]: file for part in self._parts.values() for file in part["files"]}
        names = sorted(name for name in list_files(str(self.path)) if not name.startswith("parts/"))
        with ThreadPoolExecutor(4, thread_name_prefix="hash") as pool:
            files = list(pool.map(lambda name: known.get(name) or describe(self.path, name), names))
        self._publish([file for file in files if file["path"] not in known], self.store.emit)
        volatile = sorted(volatile)
        manifest = sealed({
            **identity,
            "fingerprint": self.fingerprint,
            "attempt": self.id,
            "files": files,
            "volatile": volatile,
            "digest": digest_of(files, volatile),
            "metrics": metrics,
            "config": config,
            "code": code,
            "flow_run": os.environ.get(FLOW_RUN),
            "packages": {package: version(package) for package in PACKAGES},
            "created": utc_now(),
            "seconds": round(time.monotonic() - self.started, 3),
        })  # fmt: skip
        return self._write_manifest(manifest, replace)

    def _write_manifest(self, manifest: Json, replace: bool) -> Artifact:
        """Create the manifest, or return the artifact that another attempt has committed before."""
        target = self.store.path(self.stage, self.fingerprint, MANIFEST)
        while not self.store.write_json(target, manifest, create_only=True):
            try:
                existing = self.store.find(self.stage, self.fingerprint)
                if existing is None and not os.path.islink(target):  # it has been removed since
                    continue
            except Damaged:
                existing = None
            if existing and existing.manifest["attempt"] == self.id:  # by a creation that was said to have failed
                return existing
            same = existing and _digests(existing.manifest) == _digests(manifest)
            if existing and not (replace and (not same or existing.problems(deep=True))):
                with contextlib.suppress(OSError, NanodlmError):
                    self.store.remove_folder(self._remote())  # nobody needs the same twice
                return existing
            self.store.write_json(target, manifest)
            break
        return Artifact(self.store, self.stage, self.fingerprint, manifest)


@contextlib.contextmanager
def new_attempt(store: Store, stage: str, fingerprint: str, *, afresh: bool = False) -> Iterator[Attempt]:
    """Make a new attempt at an artifact. Any number may go on at once: the first to commit wins.

    With `afresh` it adopts only what an interrupted rebuild left. A store that cannot be written is refused at once.
    """
    try:
        store.require_create_only()
        attempt = Attempt(store, stage, fingerprint, afresh)
    except OSError as error:
        raise cannot_write(store, error) from error
    try:
        yield attempt
    finally:
        if not store.is_local:
            drop(f"attempt-{attempt.id}")


def cannot_write(store: Store, error: OSError) -> NanodlmError:
    """Return the error, in one line, of a store that cannot be written."""
    no_bucket = isinstance(error, FileNotFoundError) and not store.is_local
    reason = "there is no such bucket" if no_bucket else error.strerror or error
    remedy = "choose another with --store, or mend its permissions"
    return NanodlmError(f"cannot write to the store {store.uri()}: {reason}; {remedy}")


def _digests(manifest: Json) -> tuple[str, str | None]:
    return manifest["digest"], (manifest.get("code") or {}).get("digest")
