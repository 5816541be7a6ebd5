"""Content-verified artifacts on any fsspec URL: local disk, `s3://`, `gs://`.

    {store}/{stage}/{fingerprint}/
      manifest.json        the only commit point: written last, created once
      attempts/{id}/...    the files of one attempt; another attempt never writes there
      attempts/{id}/parts/{name}.json   a finished part (a shard, a checkpoint): its files and their sha256
      lease.json           tells a second run to wait, and others how far the first is; nothing's correctness
                           depends on it

An artifact exists when its manifest does. A killed attempt leaves finished parts, which the next attempt
adopts after checking their sha256. Readers call `Artifact.local()`, which checks every file first.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from nanodlm import cache
from nanodlm.cache import whole
from nanodlm.config import refuse_secrets
from nanodlm.errors import Damaged, NanodlmError, UsageError
from nanodlm.storage import Found, Storage, T, briefly, sha256_of

SCHEMA = 1
LEASE_SECONDS = 15.0  # an unchanged lease this old belongs to a dead run
BEAT_PATIENCE = 5.0  # a request for a lease is tried again for so long: the next beat does the same
SETTLE_SECONDS = 1.0  # of two runs that take a dead one's lease over, the later to write it has it
PACKAGES = ("nanodlm", "jax", "flax", "optax", "orbax-checkpoint", "grain", "array-record", "tiktoken", "tokenizers")
NAME = re.compile(r"[0-9A-Za-z_-]+")  # of an attempt, a stage or a fingerprint in a manifest


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, no NaN.

    Raises:
        TypeError: For anything but dict (with string keys), list, tuple, str, int, float, bool and None.

    >>> canonical_json({"b": (1, 2.5), "a": None})
    '{"a":null,"b":[1,2.5]}'
    """

    def check(v: Any) -> None:
        if isinstance(v, dict):
            for key, item in v.items():
                if not isinstance(key, str):
                    raise TypeError(f"a fingerprint takes string keys, not {key!r}")
                check(item)
        elif isinstance(v, list | tuple):
            for item in v:
                check(item)
        elif v is not None and type(v) not in (str, int, float, bool):
            raise TypeError(f"a fingerprint takes no {type(v).__name__}: {v!r}")

    check(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def fingerprint_of(identity: dict[str, Any]) -> str:
    """sha256 of the canonical JSON of everything that determines an artifact's bytes, in hex.

    >>> fingerprint_of({"stage": "shard"})[:8]
    'a8c0b4ff'
    """
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """A record with a checksum over the rest of it, so that no altered byte of it goes unnoticed.

    >>> sealed({"a": 1})["checksum"][:8]
    'f9d86028'
    """
    rest = {k: v for k, v in value.items() if k != "checksum"}
    text = json.dumps(rest, sort_keys=True)
    return {**rest, "checksum": hashlib.sha256(text.encode()).hexdigest()}


def _safe(relative: str) -> str:
    """Refuse a manifest's path that would leave its artifact."""
    path = PurePosixPath(relative)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in relative or "\0" in relative:
        raise Damaged(f"a manifest names the path {relative!r}, which leaves its artifact: do not use this store")
    return relative


def _within(folder: Path, path: Path) -> bool:
    """Whether a local path lies in a folder, links followed."""
    return path.resolve().is_relative_to(folder.resolve())


@dataclass(frozen=True)
class Artifact:
    """A committed artifact: where it is and what its manifest says."""

    store: "Store"
    stage: str
    fingerprint: str
    manifest: dict[str, Any]

    @property
    def uri(self) -> str:
        """Its address; `nanodlm show URI` and `nanodlm.load(uri)` take it."""
        return self.store.uri(self.stage, self.fingerprint)

    @property
    def digest(self) -> str:
        """sha256 over the paths, sizes and sha256 of its files: equal bytes, equal digest."""
        return self.manifest["digest"]

    @property
    def metrics(self) -> dict[str, Any]:
        """Counts and measurements that its stage recorded."""
        return self.manifest["metrics"]

    def remote(self, relative: str) -> str:
        """Path of one file on the store's file system."""
        return self.store.path(self.stage, self.fingerprint, "attempts", self.manifest["attempt"], _safe(relative))

    def files(self, *only: str) -> list[dict[str, Any]]:
        """What its manifest says of each file: `path`, `size`, `sha256`.

        Args:
            only: Prefixes of the files that are wanted; without any all are.
        """
        return [file for file in self.manifest["files"] if not only or file["path"].startswith(only)]

    def problems(self, *only: str, deep: bool = False, emit: Callable[..., None] = lambda *_, **__: None) -> list[str]:
        """What is wrong with its files, one line each: names and sizes, or with `deep` also their sha256.

        Args:
            only: Prefixes of the files to look at; without any all are.
            deep: Whether to read the files.
            emit: Called as `emit("progress", done, total, unit)` while they are read.
        """
        base = self.remote("parts").rsplit("/", 1)[0]
        found = {path: size for path, size in self.store.sizes(base).items() if not path.startswith("parts/")}
        listed = {_safe(file["path"]) for file in self.manifest["files"]}
        root = Path(self.store.path(self.stage, self.fingerprint))
        lines = [f"{path} is not in its manifest" for path in sorted(found.keys() - listed)]
        files = self.files(*only)
        done, total = 0, sum(file["size"] for file in files)
        for file in files:
            size = found.get(file["path"])
            if size is None:
                lines.append(f"{file['path']} is missing")
            elif self.store.is_local and not _within(root, Path(self.remote(file["path"]))):
                lines.append(f"{file['path']} is a link that leaves its artifact")
            elif size != file["size"]:
                lines.append(f"{file['path']} has {size} bytes, not {file['size']}")
            elif deep and (wrong := self._altered(file)):
                lines.append(f"{file['path']} {wrong}")
            done += file["size"]
            if deep:
                emit("progress", done=done / 1e6, total=total / 1e6, unit=f"MB of {self.stage} read")
        return lines

    def _altered(self, file: dict[str, Any]) -> str:
        try:
            same = self.store.sha256(self.remote(file["path"])) == file["sha256"]
        except FileNotFoundError:
            return "is missing"
        except OSError as error:  # a disk that fails, for one
            return f"cannot be read: {error.strerror or error}"
        return "" if same else "has been altered: its sha256 differs from the manifest's"

    def check(self, *only: str, deep: bool = False) -> "Artifact":
        """Return self, or raise.

        Raises:
            Damaged: Naming the first bad file and the remedy.
        """
        if self.store.asked and (lines := self.problems(*only, deep=deep)):
            more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
            raise Damaged(self.remedy(f"{lines[0]}{more}", deep=deep))
        return self

    def remedy(self, problem: str, *, deep: bool = False) -> str:
        """The line that says what is wrong with it and what to do."""
        return (
            f"the {self.stage} artifact is damaged: {problem}; `nanodlm verify {self.uri} "
            f"{'--deep ' if deep else ''}--repair` builds what is bad again"
        )

    def local(self, *only: str) -> Path:
        """A local folder with its files, each checked against its sha256.

        Files of a remote store are fetched, several at a time, into the cache, and stay there while this process lives.

        Args:
            only: Prefixes of the files that are needed; without any all are.

        Raises:
            Damaged: When a file is missing, truncated, swapped or altered.
            NanodlmError: When the cache has no room for it.
        """
        if self.store.is_local:
            self.check(*only, deep=True)
            return Path(self.remote("parts")).parent
        self.check(*only)
        files = self.files(*only)
        folder, done, total = self._entry(files), 0, sum(file["size"] for file in files)

        def arrived(size: int) -> None:
            nonlocal done
            done += size
            self.store.emit("progress", done=done / 1e6, total=total / 1e6, unit=f"MB of {self.stage} fetched")

        self._fetch(folder, files, arrived)
        return folder

    def file(self, path: str) -> Path:
        """The local path of one of its files; see `local`."""
        return self.local(path) / path

    def on_demand(self, *only: str) -> Callable[[str], Path]:
        """Like `local`, but a file of a remote store is fetched when it is first asked for.

        Args:
            only: Prefixes of the files that may be asked for; without any all may.

        Returns:
            A function from a file's path in the artifact to its local path; it raises what `local` does.
        """
        if self.store.is_local:
            return self.local(*only).joinpath
        self.check(*only)
        files = {file["path"]: file for file in self.files(*only)}
        folder = self._entry(list(files.values()))

        def fetch(path: str) -> Path:
            self._fetch(folder, [files[path]])
            return folder / path

        return fetch

    def _entry(self, files: list[dict[str, Any]]) -> Path:
        """The cache's folder for it, with room for those of these files that are not there yet."""
        name = f"{self.stage}-{self.fingerprint[:16]}-{self.manifest['attempt']}"
        there = cache.cache_dir() / "entries" / name / "files"
        missing = sum(file["size"] for file in files if not (there / _safe(file["path"])).is_file())
        return cache.hold(name, missing)

    def _fetch(
        self, folder: Path, files: list[dict[str, Any]], arrived: Callable[[int], None] = lambda _: None
    ) -> None:
        def get(pairs: list[tuple[str, Path]]) -> None:
            if not self.store.asked:
                raise NanodlmError(
                    f"{self.uri} is not wholly in the cache ({pairs[0][0]} is missing): unset NANODLM_OFFLINE"
                )
            self.store.get([(self.remote(path), target) for path, target in pairs])

        try:
            cache.fetch(folder, files, get, arrived)
        except FileNotFoundError as error:
            raise Damaged(self.remedy(f"a file is missing ({error.filename or error})")) from error
        except Damaged as error:
            raise Damaged(self.remedy(str(error), deep=True)) from error
        except OSError as error:
            raise NanodlmError(
                f"cannot write to the cache {cache.cache_dir()}: {error.strerror or error}; set NANODLM_CACHE to a "
                "folder with room"
            ) from error


@dataclass(frozen=True)
class Part:
    """A finished part of an attempt: its files, each with size and sha256, and the `info` it was finished with."""

    storage: Storage  # its root is the attempt's folder
    name: str
    files: list[dict[str, Any]]
    info: dict[str, Any]

    @property
    def uri(self) -> str:
        """Its address: a plain path on local disk, else a URL."""
        return self.storage.uri(self.name)

    @property
    def digest(self) -> str:
        """sha256 over the paths, sizes and sha256 of its files."""
        return _digest(self.files, [])

    def local(self, scratch: Path) -> Path:
        """A local folder with its files, each checked against its sha256.

        Args:
            scratch: An empty folder, for the copies of remote files.

        Raises:
            Damaged: When a file is missing, truncated, swapped or altered.
        """
        folder = Path(self.storage.root) if self.storage.is_local else scratch
        for file in self.files:
            path = folder / _safe(file["path"])
            if not self.storage.is_local:
                with contextlib.suppress(FileNotFoundError):
                    self.storage.get([(self.storage.path(file["path"]), path)])
            problem = "is missing" if not path.is_file() else "" if whole(path, file) else "has been altered"
            if not problem and not _within(folder, path):
                problem = "is a link that leaves it"
            if problem:
                raise Damaged(f"{self.uri} is damaged: {file['path']} {problem}; start from another checkpoint")
        return folder / self.name


def find_checkpoint(address: str) -> Part:
    """The checkpoint at an address; its files are not read yet.

    Args:
        address: `BASE/step_100` or `BASE/checkpoints/step_100`, the number with or without leading zeros, where BASE is
            a run's folder (that of an attempt, finished or not) or a train artifact's URI.

    Raises:
        UsageError: When no finished checkpoint is there.
    """
    base, _, step = refuse_secrets(address).rstrip("/").rpartition("/")
    if not re.fullmatch(r"step_[0-9]+", step):
        raise UsageError(f"{address!r} names no checkpoint: it must end in step_ and a number")
    store = Store(base or ".")
    if store.root.endswith("/checkpoints"):
        store = Store(store.uri().removesuffix("/checkpoints"))
    manifest = store.read_json(store.path("manifest.json"))
    if isinstance(manifest, dict) and NAME.fullmatch(str(manifest.get("attempt", ""))):
        store = Store(store.uri("attempts", str(manifest["attempt"])))
    name = f"checkpoints/step_{int(step.removeprefix('step_')):06d}"
    part = read_part(store, store.path("parts", f"{name}.json"), stage="train", part=name)
    if part is None:
        finished = sorted(path.removesuffix(".json") for path in store.sizes(store.path("parts", "checkpoints")))
        have = f"there are {', '.join(finished)}" if finished else "there are none"
        raise UsageError(f"no finished checkpoint {step} in {store.uri()}: {have}")
    return Part(store, name, part["files"], part["info"])


def read_part(storage: Storage, path: str, **of: str) -> dict[str, Any] | None:
    """The record of a finished part; None when there is none that is whole.

    Args:
        storage: Where it lies.
        path: Its path there.
        **of: What it must be of: `stage`, `fingerprint`, and its own name as `part`.
    """
    part = storage.read_json(path)
    if not isinstance(part, dict) or not part.keys() >= {"files", "info"} or part != sealed(part):
        return None
    return part if of.items() <= part.items() else None


class Store(Storage):
    """Artifacts under one URL.

    Attributes:
        emit: Called as `emit("progress", done, total, unit)` while files are on their way.
        asked: Whether it is asked at all: not when it is remote and `$NANODLM_OFFLINE` is set.
    """

    def __init__(self, url: str):
        """Open a store; nothing is created until an artifact is built.

        Raises:
            UsageError: When it cannot be one; see `Storage`.
        """
        super().__init__(url)
        self.emit: Callable[..., None] = lambda *_, **__: None
        self.asked = self.is_local or not cache.offline()

    def patiently(self, call: Callable[[], T]) -> T:
        """As `Storage.patiently`, of a store that is asked.

        Raises:
            NanodlmError: When it is not asked.
        """
        if not self.asked:
            raise NanodlmError(f"{self.uri()} is not asked while NANODLM_OFFLINE is set: unset it")
        return super().patiently(call)

    # Lookup

    def find(self, stage: str, fingerprint: str) -> Artifact | None:
        """The committed artifact, or None.

        Raises:
            Damaged: When there is a manifest that cannot be read as one.
        """
        uri = self.uri(stage, fingerprint)
        remembered = cache.cache_dir() / "manifests" / hashlib.sha256(self.uri().encode()).hexdigest()[:16]
        remembered = remembered / stage / f"{fingerprint}.json"
        if self.asked:
            manifest = self.read_json(self.path(stage, fingerprint, "manifest.json"))
        else:
            manifest = None
            with contextlib.suppress(FileNotFoundError, ValueError):  # a machine that went down may have torn it
                manifest = json.loads(remembered.read_bytes())
        if manifest is None:
            return None
        try:
            problem = _wrong_with(manifest, stage, fingerprint)
        except (TypeError, KeyError, AttributeError, ValueError):
            problem = "is not a manifest"
        if problem:
            raise Damaged(
                f"{uri}/manifest.json {problem}: `nanodlm verify {uri} --repair` builds it again, or "
                "sets it aside for the next run"
            )
        if self.asked and not self.is_local:
            with contextlib.suppress(OSError):  # only so that it can be used offline
                remembered.parent.mkdir(parents=True, exist_ok=True)
                partial = remembered.with_name(f".{secrets.token_hex(8)}")
                partial.write_text(json.dumps(manifest))
                partial.replace(remembered)
        return Artifact(self, stage, fingerprint, manifest)

    def open(self, uri: str) -> Artifact:
        """The artifact at a URI, or at the end of one, such as `train/3f2a…` or a manifest's path.

        Raises:
            NanodlmError: When there is none.
        """
        parts = refuse_secrets(uri).removesuffix("/").removesuffix("/manifest.json").split("/")
        if len(parts) >= 2 and (artifact := self.find(parts[-2], parts[-1])):
            return artifact
        raise NanodlmError(f"no artifact at {uri}: `nanodlm ls` shows what is there")

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """(stage, fingerprint) of everything that has a manifest, sorted."""
        # Not fsspec's glob: it takes signs in the root for patterns, and leaves out folders that it could not list.
        if self.is_local:
            found = [item for item in self._folders() if Path(self.path(*item, "manifest.json")).exists()]
        else:
            paths = [path.split("/") for path in self.files(self.root)]
            found = [(path[0], path[1]) for path in paths if len(path) == 3 and path[2] == "manifest.json"]
        yield from sorted(found)

    def listed(self) -> dict[str, Found]:
        """All files of all artifacts, finished or not, by path below the root."""
        if not self.is_local:
            return self.files(self.root)
        return {
            "/".join((*item, path)): found
            for item in self._folders()
            for path, found in self.files(self.path(*item)).items()
        }

    def _folders(self) -> list[tuple[str, str]]:
        """The folders of a local store's artifacts; a stage's folder may be a link to another disk."""

        def names(folder: str) -> list[str]:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # not there, or not any more
                return self.patiently(lambda: [entry.name for entry in os.scandir(folder) if entry.is_dir()])
            return []

        return [(stage, name) for stage in names(self.root) for name in names(self.path(stage))]

    # Building

    def finished(self, stage: str, fingerprint: str, since: str = "") -> dict[str, list[str]]:
        """Names of the parts that attempts have finished, each with the attempts that did, newest first.

        Args:
            stage: The artifact's stage.
            fingerprint: Its fingerprint.
            since: Leave out attempts up to this one.
        """
        found: dict[str, list[str]] = {}
        for relative in sorted(self.sizes(self.path(stage, fingerprint, "attempts")), reverse=True):
            attempt, _, rest = relative.partition("/")
            if since < attempt and rest.startswith("parts/") and rest.endswith(".json"):
                found.setdefault(rest.removeprefix("parts/").removesuffix(".json"), []).append(attempt)
        return found

    @contextlib.contextmanager
    def attempt(self, stage: str, fingerprint: str, *, afresh: bool = False) -> Iterator["Attempt"]:
        """A new attempt at an artifact. Any number may go on at once: the first to commit wins.

        Args:
            stage: The artifact's stage.
            fingerprint: Its fingerprint.
            afresh: Whether to leave aside what was finished before the artifact was committed: then only an
                interrupted rebuild is continued.

        Raises:
            NanodlmError: When the store cannot be written, or cannot create a file only once.
        """
        try:  # before any work, so that a store that cannot be written says so at once
            self.require_create_only()
        except OSError as error:
            raise _cannot_write(self, error) from error
        attempt = Attempt(self, stage, fingerprint, afresh)
        try:
            yield attempt
        finally:
            attempt.close()

    @contextlib.contextmanager
    def lease(
        self,
        stage: str,
        fingerprint: str,
        notify: Callable[[str], None] = lambda _: None,
        inputs: dict[str, str] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Hold the artifact's lease, waiting first while another run does, so that not both build it.

        Ages are measured by this process's own clock, so clocks that differ cannot mislead it. One that stopped (a
        paused process) is taken over after `LEASE_SECONDS`, and then lost to its holder; nothing rests on it.

        Args:
            stage: The artifact's stage.
            fingerprint: Its fingerprint.
            notify: Told, in words, who is being waited for.
            inputs: Fingerprints, by stage, of what is read meanwhile, which a collection then keeps.

        Yields:
            What the lease says of this holder. What it puts under `events` is there for others to read from the next
            beat on; see `events`.

        Raises:
            NanodlmError: When the store cannot be written.
        """
        path = self.path(stage, fingerprint, "lease.json")
        mine: dict[str, Any] = {"holder": secrets.token_hex(8), "host": socket.gethostname(), "pid": os.getpid()}
        mine |= {"inputs": inputs or {}, "events": {}}
        try:  # before any work, so that a store that cannot be written says so at once
            while not self.write_json(path, {**mine, "beat": 0}, create_only=True):
                if not self._wait_for_lease(path, notify):
                    continue
                self.write_json(path, {**mine, "beat": 0})
                time.sleep(SETTLE_SECONDS)
                if self._holder(path) == mine["holder"]:
                    break
        except OSError as error:
            raise _cannot_write(self, error) from error
        stop = threading.Event()

        def beat() -> None:
            count = 0
            while not stop.wait(LEASE_SECONDS / 3):
                count += 1
                with briefly(BEAT_PATIENCE), contextlib.suppress(OSError, NanodlmError):
                    if self._holder(path) != mine["holder"]:
                        return  # taken over while this process stood still
                    self.write_json(path, {**mine, "beat": count})

        thread = threading.Thread(target=beat, name="lease", daemon=True)
        thread.start()
        try:
            yield mine
        finally:
            stop.set()
            thread.join()
            with briefly(BEAT_PATIENCE), contextlib.suppress(OSError, NanodlmError):  # nobody waits for this to end
                if self._holder(path) == mine["holder"]:
                    self.remove(path)

    def events(self, stage: str, fingerprint: str) -> dict[str, dict[str, Any]]:
        """The latest events, by kind, of whoever is building an artifact, as its lease tells; empty where nobody is."""
        held = self.read_json(self.path(stage, fingerprint, "lease.json"))
        events = held.get("events") if isinstance(held, dict) else None
        return {k: event for k, event in events.items() if isinstance(event, dict)} if isinstance(events, dict) else {}

    def _holder(self, path: str) -> str | None:
        held = self.read_json(path)
        return held.get("holder") if isinstance(held, dict) else None

    def _wait_for_lease(self, path: str, notify: Callable[[str], None]) -> bool:
        """Wait while a live run holds it. Whether a dead one's is left to be taken over."""
        seen, since = self.read_json(path), time.monotonic()
        if isinstance(seen, dict):
            notify(f"process {seen.get('pid')} on {seen.get('host')} is building it; waiting")
        while isinstance(seen, dict):
            if seen.get("host") == socket.gethostname() and not _alive(seen.get("pid")):
                return True
            time.sleep(0.2 if self.is_local else 0.5)
            now = self.read_json(path)
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > LEASE_SECONDS:
                return True
        return seen is not None

    def retire(self, artifact_dir: tuple[str, str]) -> None:
        """Remove a manifest, so that the next run rebuilds the artifact from the parts that are still good."""
        self.remove(self.path(*artifact_dir, "manifest.json"))


class Attempt:
    """One try at building an artifact: a local folder whose files become the artifact at `commit`."""

    def __init__(self, store: Store, stage: str, fingerprint: str, afresh: bool = False):
        """Make a new, empty attempt."""
        self.store, self.stage, self.fingerprint, self.afresh = store, stage, fingerprint, afresh
        self.id = f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{secrets.token_hex(4)}"  # sorts by time
        self.started = time.monotonic()
        self._parts: dict[str, dict[str, Any]] = {}
        self._entry = f"attempt-{self.id}"  # of the cache, when the store is remote
        if not store.is_local:
            self.path = cache.hold(self._entry)
            return
        self.path = Path(self._remote())
        try:
            self.path.mkdir(parents=True)
        except OSError as error:
            raise _cannot_write(store, error) from error

    def close(self) -> None:
        """Remove local copies of what lies in a remote store."""
        if not self.store.is_local:
            cache.drop(self._entry)

    def _remote(self, *relative: str) -> str:
        return self.store.path(self.stage, self.fingerprint, "attempts", self.id, *relative)

    def finish(self, name: str, files: Iterable[str], **info: Any) -> None:
        """Record files (relative paths) as a finished part, which a later attempt may adopt.

        Args:
            name: The part's name, unique in the attempt; it may contain slashes.
            files: Files that will not change any more.
            **info: Anything JSON can hold that whoever adopts it will want to know.
        """
        names = sorted(files)
        self._publish(names, lambda *_, **__: None)
        self._record(name, [_listed(self.path, file) for file in names], info)

    def _record(self, name: str, files: list[dict[str, Any]], info: dict[str, Any]) -> None:
        # It says whose it is, so that one in another's place is not taken for that.
        part = {"stage": self.stage, "fingerprint": self.fingerprint, "part": name, "files": files, "info": info}
        self.store.write_json(self._remote("parts", f"{name}.json"), sealed(part))
        self._parts[name] = part

    def _publish(self, files: list[str], emit: Callable[..., None]) -> None:
        """Copy files to the store, unless they are in it already because it is on this disk."""
        if self.store.is_local:
            return
        done, total = 0, sum((self.path / file).stat().st_size for file in files)

        def arrived(size: int) -> None:
            nonlocal done
            done += size
            emit("progress", done=done / 1e6, total=total / 1e6, unit="MB published")

        self.store.put([(self.path / file, self._remote(file)) for file in files], arrived)

    def forget(self, name: str) -> None:
        """Drop a finished part and its files, here and in the store."""
        part = self._parts.pop(name)
        self.store.remove(self._remote("parts", f"{name}.json"))
        self._unlink(part)
        if not self.store.is_local:
            self.store.remove(*(self._remote(file["path"]) for file in part["files"]))

    @cached_property
    def earlier(self) -> dict[str, list[str]]:
        """Names of the parts that earlier attempts finished, each with the attempts that did, newest first."""
        since = ""
        if self.afresh:
            artifact = self.store.find(self.stage, self.fingerprint)
            since = artifact.manifest["attempt"] if artifact else self.id
        found = self.store.finished(self.stage, self.fingerprint, since)
        others = {name: [attempt for attempt in attempts if attempt != self.id] for name, attempts in found.items()}
        return {name: attempts for name, attempts in others.items() if attempts}

    def uri(self, name: str) -> str:
        """Address, in the store, of a file or folder of this attempt."""
        return self.store.uri(self.stage, self.fingerprint, "attempts", self.id, name)

    def info(self, name: str) -> dict[str, Any] | None:
        """What a part that an earlier attempt finished was finished with; its files are not looked at."""
        return next((part["info"] for _, part in self._earlier_parts(name)), None)

    def adopt(self, name: str) -> dict[str, Any] | None:
        """Take over a part that an earlier attempt finished, if one's files are all still what they were.

        Returns:
            The `info` it was finished with, or None: then build it.
        """
        for base, part in self._earlier_parts(name):
            copy = self._link if self.store.is_local else self._copy
            if copy(base, part["files"]):
                self._record(name, part["files"], part["info"])
                return part["info"]
            self._unlink(part)  # half a part must not be committed
        return None

    def _earlier_parts(self, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The folders of earlier attempts that finished a part, and its records, newest first."""
        for attempt in self.earlier.get(name, ()):
            base = self.store.path(self.stage, self.fingerprint, "attempts", attempt)
            of = {"stage": self.stage, "fingerprint": self.fingerprint, "part": name}
            if part := read_part(self.store, f"{base}/parts/{name}.json", **of):
                yield base, part

    def _unlink(self, part: dict[str, Any]) -> None:
        """Remove a part's local files and the folders that this leaves empty."""
        for file in part["files"]:
            path = self.path / _safe(file["path"])
            path.unlink(missing_ok=True)
            for folder in path.parents:
                if folder == self.path or not folder.is_dir() or any(folder.iterdir()):
                    break
                folder.rmdir()

    def _link(self, base: str, files: list[dict[str, Any]]) -> bool:
        """Take files of an earlier attempt on this disk over; whether all of them are whole."""
        root = Path(self.store.path(self.stage, self.fingerprint))
        for file in files:
            source, target = Path(base, _safe(file["path"])), self.path / file["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            if not _within(root, source):
                return False
            try:
                os.link(source, target)  # finished files never change, so sharing them is safe
            except FileNotFoundError:
                return False
            except OSError:
                shutil.copyfile(source, target)
            if not whole(target, file):
                return False
        return True

    def _copy(self, base: str, files: list[dict[str, Any]]) -> bool:
        """Take files of an earlier attempt in a bucket over; whether all of them are whole.

        The server copies them, so nothing is sent. What is read and compared is the copies: that is what is committed.
        """
        copies = [(f"{base}/{_safe(file['path'])}", self._remote(file["path"])) for file in files]
        try:
            self.store.copy(copies)
            self.store.get([(copy, self.path / file["path"]) for (_, copy), file in zip(copies, files, strict=True)])
            if all(whole(self.path / file["path"], file) for file in files):
                return True
        except FileNotFoundError:
            pass
        self.store.remove(*(copy for _, copy in copies))
        return False

    def commit(
        self,
        *,
        identity: dict[str, Any],
        metrics: dict[str, Any],
        config: dict[str, Any] | None = None,
        volatile: Iterable[str] = (),
        replace: bool = False,
    ) -> Artifact:
        """Publish every file of the attempt's folder and write the manifest.

        Args:
            identity: What the fingerprint was made of.
            metrics: Counts and measurements.
            config: The whole configuration of the run, from which `verify --repair` builds it again.
            volatile: Prefixes of files that hold times or logs: verified like all others, but left out of the
                digest, because equal results may differ there.
            replace: Put this in the place of an existing manifest whose digest differs (an explicit rebuild).

        Returns:
            The committed artifact: this one, or the one that another attempt committed first.
        """
        known = {file["path"]: file for part in self._parts.values() for file in part["files"]}
        names = sorted(p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file())
        names = [name for name in names if not name.startswith("parts/")]
        self._publish([name for name in names if name not in known], self.store.emit)
        with ThreadPoolExecutor(4, thread_name_prefix="hash") as pool:
            files = list(pool.map(lambda name: known.get(name) or _listed(self.path, name), names))
        volatile = sorted(volatile)
        manifest = sealed({
            **identity,
            "fingerprint": self.fingerprint,
            "attempt": self.id,
            "files": files,
            "volatile": volatile,
            "digest": _digest(files, volatile),
            "metrics": metrics,
            "config": config,
            "packages": {p: v for p in PACKAGES if (v := _version(p))},
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(time.monotonic() - self.started, 3),
        })  # fmt: skip
        target = self.store.path(self.stage, self.fingerprint, "manifest.json")
        while not self.store.write_json(target, manifest, create_only=True):
            try:
                existing = self.store.find(self.stage, self.fingerprint)
            except Damaged:
                existing = None
            else:
                if existing is None and not os.path.islink(target):  # it has been removed since
                    continue
            if existing and existing.manifest["attempt"] == self.id:  # by a creation that was said to have failed
                return existing
            if existing and not (replace and (existing.digest != manifest["digest"] or existing.problems(deep=True))):
                with contextlib.suppress(OSError, NanodlmError):
                    self.store.remove_folder(self._remote())  # nobody needs the same twice
                return existing
            self.store.write_json(target, manifest)
            break
        return Artifact(self.store, self.stage, self.fingerprint, manifest)


def _cannot_write(store: Store, error: OSError) -> NanodlmError:
    no_bucket = isinstance(error, FileNotFoundError) and not store.is_local
    reason = "there is no such bucket" if no_bucket else error.strerror or error
    return NanodlmError(
        f"cannot write to the store {store.uri()}: {reason}; choose another with --store, or mend its permissions"
    )


def _listed(folder: Path, name: str) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"path": name, "size": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}


def _wrong_with(manifest: Any, stage: str, fingerprint: str) -> str:
    """What is wrong with a manifest in itself; empty when nothing is."""
    needed = {"schema", "digest", "files", "volatile", "attempt", "metrics", "inputs", "parameters"}
    if not isinstance(manifest, dict) or not needed <= manifest.keys():
        return "is not a manifest"
    if manifest != sealed(manifest):
        return "has been altered: its checksum is not that of its content"
    if manifest["digest"] != _digest(manifest["files"], manifest["volatile"]):
        return "has been altered: its digest is not its files'"
    if (manifest.get("stage"), manifest.get("fingerprint")) != (stage, fingerprint):
        return f"belongs to {manifest.get('stage')}/{manifest.get('fingerprint')}"
    if not NAME.fullmatch(manifest["attempt"]):
        return "names an attempt that leaves its artifact"
    inputs = [(name, made["fingerprint"]) for name, made in manifest["inputs"].items()]
    if not all(NAME.fullmatch(part) for address in inputs for part in address):
        return "names an input that leaves the store"
    return ""


def _digest(files: list[dict[str, Any]], volatile: list[str]) -> str:
    """sha256 over path, size and sha256 of the files whose bytes the inputs determine."""
    return fingerprint_of(
        {f["path"]: [f["size"], f["sha256"]] for f in files if not f["path"].startswith(tuple(volatile))}
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _alive(pid: Any) -> bool:
    if type(pid) is not int or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
