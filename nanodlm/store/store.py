"""A store and its committed artifacts, whose files are verified before anybody reads them."""

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanodlm.config import refuse_secrets
from nanodlm.errors import Damaged, NanodlmError
from nanodlm.store import cache
from nanodlm.store.cache import cache_dir, hold, offline
from nanodlm.store.disk import Found
from nanodlm.store.files import Storage, T
from nanodlm.store.manifest import _safe, _wrong_with
from nanodlm.store.part import _within


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
        there = cache_dir() / "entries" / name / "files"
        missing = sum(file["size"] for file in files if not (there / _safe(file["path"])).is_file())
        return hold(name, missing)

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
                f"cannot write to the cache {cache_dir()}: {error.strerror or error}; set NANODLM_CACHE to a "
                "folder with room"
            ) from error


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
        self.asked = self.is_local or not offline()

    def patiently(self, call: Callable[[], T]) -> T:
        """As `Storage.patiently`, of a store that is asked.

        Raises:
            NanodlmError: When it is not asked.
        """
        if not self.asked:
            raise NanodlmError(f"{self.uri()} is not asked while NANODLM_OFFLINE is set: unset it")
        return super().patiently(call)

    def find(self, stage: str, fingerprint: str) -> Artifact | None:
        """The committed artifact, or None.

        Raises:
            Damaged: When there is a manifest that cannot be read as one.
        """
        uri = self.uri(stage, fingerprint)
        remembered = cache_dir() / "manifests" / hashlib.sha256(self.uri().encode()).hexdigest()[:16]
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

    def retire(self, artifact_dir: tuple[str, str]) -> None:
        """Remove a manifest, so that the next run rebuilds the artifact from the parts that are still good."""
        self.remove(self.path(*artifact_dir, "manifest.json"))
