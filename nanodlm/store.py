"""Content-verified artifacts on any fsspec URL: local disk, `s3://`, `gs://`.

    {store}/{stage}/{fingerprint}/
      manifest.json        the only commit point: written last, created once
      attempts/{id}/...    the files of one attempt; another attempt never writes there
      attempts/{id}/parts/{name}.json   a finished part (a shard, a checkpoint): its files and their sha256
      lease.json           tells a second run to wait; nothing's correctness depends on it

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
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from nanodlm.errors import Damaged, NanodlmError, UsageError

SCHEMA = 1
LEASE_SECONDS = 15.0  # an unchanged lease this old belongs to a dead run
PACKAGES = ("nanodlm", "jax", "flax", "optax", "orbax-checkpoint", "grain", "array-record", "tiktoken", "tokenizers")


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


def sha256_of(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _whole(path: Path, file: dict[str, Any]) -> bool:
    """Whether a file is what its record says."""
    return path.stat().st_size == file["size"] and sha256_of(path) == file["sha256"]


def cache_dir() -> Path:
    """Where copies of remote artifacts lie: `$NANODLM_CACHE`, else `~/.cache/nanodlm`."""
    return Path(os.environ.get("NANODLM_CACHE") or Path.home() / ".cache" / "nanodlm")


def _safe(relative: str) -> str:
    """Refuse a manifest's path that would leave its artifact."""
    path = PurePosixPath(relative)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in relative:
        raise Damaged(f"a manifest names the path {relative!r}, which leaves its artifact: do not use this store")
    return relative


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

    def problems(self, *, deep: bool = False, only: str = "") -> list[str]:
        """What is wrong with its files, one line each: names and sizes, or with `deep` also their sha256.

        Args:
            deep: Whether to read the files.
            only: Prefix of the files to look at.
        """
        base = self.remote("parts").rsplit("/", 1)[0]
        found = {path: size for path, size in self.store.sizes(base).items() if not path.startswith("parts/")}
        listed = {_safe(file["path"]) for file in self.manifest["files"]}
        lines = [f"{path} is not in its manifest" for path in sorted(found.keys() - listed)]
        for file in self.manifest["files"]:
            if not file["path"].startswith(only):
                continue
            size = found.get(file["path"])
            if size is None:
                lines.append(f"{file['path']} is missing")
            elif size != file["size"]:
                lines.append(f"{file['path']} has {size} bytes, not {file['size']}")
            elif deep and self.store.sha256(self.remote(file["path"])) != file["sha256"]:
                lines.append(f"{file['path']} has been altered: its sha256 differs from the manifest's")
        return lines

    def check(self, *, deep: bool = False, only: str = "") -> "Artifact":
        """Return self, or raise.

        Raises:
            Damaged: Naming the first bad file and the remedy.
        """
        if lines := self.problems(deep=deep, only=only):
            more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
            raise Damaged(self.remedy(f"{lines[0]}{more}", deep=deep))
        return self

    def remedy(self, problem: str, *, deep: bool = False) -> str:
        """The line that says what is wrong with it and what to do."""
        return (
            f"the {self.stage} artifact is damaged: {problem}; `nanodlm verify {self.uri} "
            f"{'--deep ' if deep else ''}--repair` sets it aside, and the next run rebuilds it"
        )

    def local(self, only: str = "") -> Path:
        """A local folder with its files, each checked against its sha256.

        Args:
            only: Prefix of the files that are needed; by default all are.

        Raises:
            Damaged: When a file is missing, truncated, swapped or altered.
        """
        if self.store.is_local:
            self.check(deep=True, only=only)
            return Path(self.remote("parts")).parent
        self.check()
        folder = cache_dir() / "artifacts" / self.stage / f"{self.fingerprint}-{self.digest[:16]}"
        for file in self.manifest["files"]:
            if not file["path"].startswith(only):
                continue
            target = folder / file["path"]
            if not (target.exists() and _whole(target, file)):
                target.parent.mkdir(parents=True, exist_ok=True)
                partial = target.with_name(f"{target.name}.{secrets.token_hex(4)}.partial")
                self.store.fs.get_file(self.remote(file["path"]), str(partial))
                if sha256_of(partial) != file["sha256"]:
                    partial.unlink()
                    raise Damaged(self.remedy(f"{file['path']} has been altered", deep=True))
                partial.replace(target)
        return folder


@dataclass(frozen=True)
class Part:
    """A finished part of an attempt: its files, each with size and sha256, and the `info` it was finished with."""

    fs: fsspec.AbstractFileSystem
    base: str
    name: str
    files: list[dict[str, Any]]
    info: dict[str, Any]

    @property
    def uri(self) -> str:
        """Its address: a plain path on local disk, else a URL."""
        path = f"{self.base}/{self.name}"
        return path if isinstance(self.fs, LocalFileSystem) else self.fs.unstrip_protocol(path)

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
        remote = not isinstance(self.fs, LocalFileSystem)
        folder = scratch if remote else Path(self.base)
        for file in self.files:
            path = folder / _safe(file["path"])
            if remote and self.fs.exists(f"{self.base}/{file['path']}"):
                path.parent.mkdir(parents=True, exist_ok=True)
                self.fs.get_file(f"{self.base}/{file['path']}", str(path))
            problem = "is missing" if not path.is_file() else "" if _whole(path, file) else "has been altered"
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
    base, _, step = address.rstrip("/").rpartition("/")
    if not re.fullmatch(r"step_[0-9]+", step):
        raise UsageError(f"{address!r} names no checkpoint: it must end in step_ and a number")
    store = Store(base or ".")
    if store.root.endswith("/checkpoints"):
        store = Store(store.uri().removesuffix("/checkpoints"))
    manifest = store._read_json(store.path("manifest.json"))
    if isinstance(manifest, dict) and "attempt" in manifest:
        store = Store(store.uri("attempts", str(manifest["attempt"])))
    name = f"checkpoints/step_{int(step.removeprefix('step_')):06d}"
    part = store._read_json(store.path("parts", f"{name}.json"))
    if not isinstance(part, dict) or not part.keys() >= {"files", "info"}:
        finished = sorted(path.removesuffix(".json") for path in store.sizes(store.path("parts", "checkpoints")))
        have = f"there are {', '.join(finished)}" if finished else "there are none"
        raise UsageError(f"no finished checkpoint {step} in {store.uri()}: {have}")
    return Part(store.fs, store.root, name, part["files"], part["info"])


class Store:
    """Artifacts under one URL."""

    def __init__(self, url: str):
        """Open a store; nothing is created until an artifact is built.

        Raises:
            UsageError: When the URL's protocol is unknown or its driver is not installed.
        """
        try:
            self.fs, root = fsspec.url_to_fs(url, use_listings_cache=False)
        except (ValueError, ImportError) as error:
            raise UsageError(f"cannot open the store {url}: {error}") from error
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self.root = str(Path(root).absolute()) if self.is_local else root.rstrip("/")

    def path(self, *parts: str) -> str:
        """Path below the root, for the file system's own calls."""
        return "/".join((self.root, *parts))

    def uri(self, *parts: str) -> str:
        """Address of a path below the root: a plain path on local disk, else a URL."""
        return self.path(*parts) if self.is_local else self.fs.unstrip_protocol(self.path(*parts))

    # Lookup

    def find(self, stage: str, fingerprint: str) -> Artifact | None:
        """The committed artifact, or None.

        Raises:
            Damaged: When there is a manifest that cannot be read as one.
        """
        manifest = self._read_json(self.path(stage, fingerprint, "manifest.json"))
        if manifest is None:
            return None
        needed = {"schema", "digest", "files", "volatile", "attempt", "metrics", "inputs", "parameters"}
        uri = self.uri(stage, fingerprint)
        if not isinstance(manifest, dict) or not needed <= manifest.keys():
            raise Damaged(
                f"{uri}/manifest.json is not a manifest: `nanodlm verify {uri} --repair` sets it aside, "
                "and the next run rebuilds it"
            )
        if manifest["digest"] != _digest(manifest["files"], manifest["volatile"]):
            raise Damaged(
                f"{uri}/manifest.json has been altered: its digest is not its files': "
                f"`nanodlm verify {uri} --repair` sets it aside, and the next run rebuilds it"
            )
        if (manifest.get("stage"), manifest.get("fingerprint")) != (stage, fingerprint):
            raise Damaged(
                f"{uri}/manifest.json belongs to {manifest.get('stage')}/{manifest.get('fingerprint')}: "
                f"`nanodlm verify {uri} --repair` sets it aside, and the next run rebuilds it"
            )
        return Artifact(self, stage, fingerprint, manifest)

    def open(self, uri: str) -> Artifact:
        """The artifact at a URI, or at the end of one, such as `train/3f2a…` or a manifest's path.

        Raises:
            NanodlmError: When there is none.
        """
        parts = uri.removesuffix("/").removesuffix("/manifest.json").split("/")
        if len(parts) >= 2 and (artifact := self.find(parts[-2], parts[-1])):
            return artifact
        raise NanodlmError(f"no artifact at {uri}: `nanodlm ls` shows what is there")

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """(stage, fingerprint) of everything that has a manifest, sorted."""
        for path in sorted(self.fs.glob(self.path("*", "*", "manifest.json"))):
            yield tuple(str(path).split("/")[-3:-1])  # type: ignore[misc]

    def sizes(self, folder: str) -> dict[str, int]:
        """Sizes in bytes of all files below a folder, by relative path."""
        return {path: int(info["size"]) for path, info in self._below(folder).items()}

    def _below(self, folder: str) -> dict[str, dict[str, Any]]:
        try:
            found: dict[str, Any] = self.fs.find(folder, detail=True)  # type: ignore[assignment]
        except FileNotFoundError:
            return {}
        prefix = folder.lstrip("/") + "/"
        return {path.lstrip("/").removeprefix(prefix): info for path, info in found.items()}

    def sha256(self, path: str) -> str:
        """sha256 of a file in the store, in hex."""
        with self.fs.open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]

    def abandoned(self, older_than: float) -> Iterator[tuple[str, int]]:
        """Attempts that nobody needs: relative path and size in bytes.

        Those are the ones that no manifest names and no file of which changed lately. Kept are all attempts at what
        has a lease, and the newest with a finished part of what has no manifest, from which a run would continue.

        Args:
            older_than: Seconds since the last change, by the clock of whoever asks.
        """
        groups: dict[str, list[dict[str, Any]]] = {}
        leased, resumable = set(), {}
        for path, info in sorted(self._below(self.root).items()):
            parts = path.split("/")
            if len(parts) > 4 and parts[2] == "attempts":
                groups.setdefault("/".join(parts[:4]), []).append(info)
                if parts[4] == "parts":
                    resumable[tuple(parts[:2])] = parts[3]  # the newest with a finished part
            elif parts[2:] == ["lease.json"]:
                leased.add(tuple(parts[:2]))
        for attempt, files in groups.items():
            stage, fingerprint, _, id_ = attempt.split("/")
            if (stage, fingerprint) in leased:
                continue  # somebody may be at work
            try:
                artifact = self.find(stage, fingerprint)
            except Damaged:
                continue  # its manifest may have named this attempt
            if artifact.manifest["attempt"] == id_ if artifact else resumable.get((stage, fingerprint)) == id_:
                continue
            if time.time() - max(_changed(info) for info in files) > older_than:
                yield attempt, sum(int(info["size"]) for info in files)

    # Building

    @contextlib.contextmanager
    def attempt(self, stage: str, fingerprint: str, *, afresh: bool = False) -> Iterator["Attempt"]:
        """A new attempt at an artifact, holding the lease while it lasts.

        Args:
            stage: The artifact's stage.
            fingerprint: Its fingerprint.
            afresh: Whether to leave aside what was finished before the artifact was committed: then only an
                interrupted rebuild is continued.

        Raises:
            NanodlmError: When the store cannot be written.
        """
        attempt = Attempt(self, stage, fingerprint, afresh)
        lease = self.path(stage, fingerprint, "lease.json")
        stop = threading.Event()
        holder = {"attempt": attempt.id, "host": socket.gethostname(), "pid": os.getpid()}

        def beat() -> None:
            count = 0
            while not stop.wait(LEASE_SECONDS / 3):
                count += 1
                with contextlib.suppress(OSError):
                    self.write_json(lease, {**holder, "beat": count})

        try:  # before any work, so that a store that cannot be written says so at once
            self.write_json(lease, {**holder, "beat": 0})
        except OSError as error:
            attempt.close()
            raise _cannot_write(self, error) from error
        thread = threading.Thread(target=beat, name="lease", daemon=True)
        thread.start()
        try:
            yield attempt
        finally:
            stop.set()
            thread.join()
            held = self._read_json(lease)
            if isinstance(held, dict) and held.get("attempt") == attempt.id:
                with contextlib.suppress(OSError):
                    self.fs.rm_file(lease)
            attempt.close()

    def wait_for_lease(self, stage: str, fingerprint: str, notify: Callable[[str], None] = lambda _: None) -> None:
        """Wait while another live run builds this artifact: until its lease is gone or stops changing.

        Ages are measured by this process's own clock, so clocks that differ cannot mislead it.
        """
        lease = self.path(stage, fingerprint, "lease.json")
        seen, since = self._read_json(lease), time.monotonic()
        if isinstance(seen, dict):
            notify(f"process {seen.get('pid')} on {seen.get('host')} is building it; waiting")
        while isinstance(seen, dict):
            if seen.get("host") == socket.gethostname() and not _alive(int(seen.get("pid", 0))):
                return
            time.sleep(0.2)
            now = self._read_json(lease)
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > LEASE_SECONDS:
                return

    def retire(self, artifact_dir: tuple[str, str]) -> None:
        """Remove a manifest, so that the next run rebuilds the artifact from the parts that are still good."""
        self.fs.rm_file(self.path(*artifact_dir, "manifest.json"))

    # Files

    def _read_json(self, path: str) -> Any:
        """Parsed content, None where there is no file, and the empty string where it is not JSON."""
        try:
            return json.loads(self.fs.cat_file(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError:
            return ""

    def write_json(self, path: str, value: Any, *, create_only: bool = False) -> bool:
        """Write atomically. With `create_only` return False, changing nothing, when the file exists."""
        data = json.dumps(value, indent=1, sort_keys=True).encode()
        if not self.is_local:
            try:
                self.fs.pipe_file(path, data, mode="create" if create_only else "overwrite")
            except FileExistsError:
                return False
            except OSError as error:
                if "PreconditionFailed" in f"{error} {error.__cause__!r}":
                    return False
                raise
            return True
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".", delete=False) as file:
            os.chmod(file.name, 0o644)  # a store is shared
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            if create_only:
                os.link(file.name, target)
                os.unlink(file.name)
            else:
                os.replace(file.name, target)
        except FileExistsError:
            os.unlink(file.name)
            return False
        return True


class Attempt:
    """One try at building an artifact: a local folder whose files become the artifact at `commit`."""

    def __init__(self, store: Store, stage: str, fingerprint: str, afresh: bool = False):
        """Make a new, empty attempt."""
        self.store, self.stage, self.fingerprint, self.afresh = store, stage, fingerprint, afresh
        self.id = f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{secrets.token_hex(4)}"  # sorts by time
        self.started = time.monotonic()
        self._parts: dict[str, dict[str, Any]] = {}
        self._scratch: Path | None = None
        try:
            if store.is_local:
                self.path = Path(self._remote())
                self.path.mkdir(parents=True)
            else:
                cache_dir().mkdir(parents=True, exist_ok=True)
                self.path = self._scratch = Path(tempfile.mkdtemp(dir=cache_dir(), prefix=f"{stage}-"))
        except OSError as error:
            raise _cannot_write(store, error) from error

    def close(self) -> None:
        """Remove local copies of what lies in a remote store."""
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _remote(self, *relative: str) -> str:
        return self.store.path(self.stage, self.fingerprint, "attempts", self.id, *relative)

    def finish(self, name: str, files: Iterable[str], **info: Any) -> None:
        """Record files (relative paths) as a finished part, which a later attempt may adopt.

        Args:
            name: The part's name, unique in the attempt; it may contain slashes.
            files: Files that will not change any more.
            **info: Anything JSON can hold that whoever adopts it will want to know.
        """
        listed = [
            {"path": f, "size": (self.path / f).stat().st_size, "sha256": sha256_of(self.path / f)}
            for f in sorted(files)
        ]
        self._record(name, {"files": listed, "info": info})

    def _record(self, name: str, part: dict[str, Any]) -> None:
        if not self.store.is_local:
            for file in part["files"]:
                self.store.fs.put_file(str(self.path / file["path"]), self._remote(file["path"]))
        self.store.write_json(self._remote("parts", f"{name}.json"), part)
        self._parts[name] = part

    def forget(self, name: str) -> None:
        """Drop a finished part and its files, here and in the store."""
        part = self._parts.pop(name)
        with contextlib.suppress(FileNotFoundError):
            self.store.fs.rm_file(self._remote("parts", f"{name}.json"))
        self._unlink(part)
        if not self.store.is_local:
            for file in part["files"]:
                with contextlib.suppress(FileNotFoundError):
                    self.store.fs.rm_file(self._remote(file["path"]))

    @cached_property
    def earlier(self) -> dict[str, list[str]]:
        """Names of the parts that earlier attempts finished, each with the attempts that did, newest first."""
        found: dict[str, list[str]] = {}
        since = ""
        if self.afresh:
            artifact = self.store.find(self.stage, self.fingerprint)
            since = artifact.manifest["attempt"] if artifact else self.id
        attempts = self.store.path(self.stage, self.fingerprint, "attempts")
        for relative in sorted(self.store.sizes(attempts), reverse=True):
            attempt, _, rest = relative.partition("/")
            if since < attempt != self.id and rest.startswith("parts/") and rest.endswith(".json"):
                found.setdefault(rest.removeprefix("parts/").removesuffix(".json"), []).append(attempt)
        return found

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
            if all(self._copy(f"{base}/{_safe(file['path'])}", file) for file in part["files"]):
                self._record(name, part)
                return part["info"]
            self._unlink(part)  # half a part must not be committed
        return None

    def _earlier_parts(self, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The folders of earlier attempts that finished a part, and its records, newest first."""
        for attempt in self.earlier.get(name, ()):
            base = self.store.path(self.stage, self.fingerprint, "attempts", attempt)
            part = self.store._read_json(f"{base}/parts/{name}.json")
            if isinstance(part, dict) and part.keys() >= {"files", "info"}:
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

    def _copy(self, source: str, file: dict[str, Any]) -> bool:
        target = self.path / file["path"]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            if self.store.is_local:
                os.link(source, target)  # finished files never change, so sharing them is safe
            else:
                self.store.fs.get_file(source, str(target))
        except FileNotFoundError:
            return False
        except OSError:
            shutil.copyfile(source, target)
        if _whole(target, file):
            return True
        target.unlink()
        return False

    def commit(
        self,
        *,
        identity: dict[str, Any],
        metrics: dict[str, Any],
        volatile: Iterable[str] = (),
        replace: bool = False,
    ) -> Artifact:
        """Publish every file of the attempt's folder and write the manifest.

        Args:
            identity: What the fingerprint was made of.
            metrics: Counts and measurements.
            volatile: Prefixes of files that hold times or logs: verified like all others, but left out of the
                digest, because equal results may differ there.
            replace: Put this in the place of an existing manifest whose digest differs (an explicit rebuild).

        Returns:
            The committed artifact: this one, or the one that another attempt committed first.
        """
        known = {file["path"]: file for part in self._parts.values() for file in part["files"]}
        files = []
        for path in sorted(p for p in self.path.rglob("*") if p.is_file()):
            relative = path.relative_to(self.path).as_posix()
            if relative.startswith("parts/"):
                continue
            if relative not in known:
                if not self.store.is_local:
                    self.store.fs.put_file(str(path), self._remote(relative))
                known[relative] = {"path": relative, "size": path.stat().st_size, "sha256": sha256_of(path)}
            files.append(known[relative])
        volatile = sorted(volatile)
        manifest = {
            **identity,
            "fingerprint": self.fingerprint,
            "attempt": self.id,
            "files": files,
            "volatile": volatile,
            "digest": _digest(files, volatile),
            "metrics": metrics,
            "packages": {p: v for p in PACKAGES if (v := _version(p))},
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(time.monotonic() - self.started, 3),
        }
        target = self.store.path(self.stage, self.fingerprint, "manifest.json")
        if not self.store.write_json(target, manifest, create_only=True):
            try:
                existing = self.store.find(self.stage, self.fingerprint)
            except Damaged:
                existing = None
            if existing and not (replace and (existing.digest != manifest["digest"] or existing.problems(deep=True))):
                with contextlib.suppress(OSError):
                    self.store.fs.rm(self._remote(), recursive=True)  # nobody needs the same twice
                return existing
            self.store.write_json(target, manifest)
        return Artifact(self.store, self.stage, self.fingerprint, manifest)


def _cannot_write(store: Store, error: OSError) -> NanodlmError:
    return NanodlmError(
        f"cannot write to the store {store.uri()}: {error.strerror or error}; "
        "choose another with --store, or mend its permissions"
    )


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


def _changed(info: dict[str, Any]) -> float:
    """When a file last changed, as a Unix time; stores name it differently."""
    for key in ("mtime", "LastModified", "updated", "created"):
        value = info.get(key)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, str):
            return datetime.fromisoformat(value).timestamp()
    return time.time()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
