"""A committed artifact, whose files are verified before anybody reads them, and the finished parts of attempts."""

import contextlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from nanodlm.errors import Damaged, Emit, NanodlmError, silent
from nanodlm.store import cache
from nanodlm.store.disk import Found, is_whole
from nanodlm.store.files import Storage, show_transfer
from nanodlm.store.manifest import Item, Json, digest_of, is_sealed, safe, sealed

if TYPE_CHECKING:
    from nanodlm.store.store import Store


@dataclass(frozen=True)
class Part:
    """A finished part of an attempt: its files, each with size and sha256, and the `info` it was finished with."""

    storage: Storage
    folder: str  # path of the attempt's folder
    name: str
    of: Json  # its `stage` and `fingerprint`, so that one in another's place is not taken for that
    files: list[Json]
    info: Json
    e_tags: dict[str, str] = field(default_factory=dict)  # of its files, where a bucket tells them

    @property
    def uri(self) -> str:
        """Its address: a plain path on local disk, else a URL."""
        return self.storage.address(f"{self.folder}/{self.name}")

    @property
    def digest(self) -> str:
        """The sha256 over the paths, sizes and sha256 of its files."""
        return digest_of(self.files, [])

    def record(self) -> None:
        """Record that its attempt has its files."""
        record = {**self.of, "part": self.name, "files": self.files, "info": self.info, "e_tags": self.e_tags}
        self.storage.write_json(f"{self.folder}/parts/{self.name}.json", sealed(record))

    def local(self, scratch: Path) -> Path:
        """Return a local folder with its files, each compared with its sha256; remote ones are copied to `scratch`."""
        here = Path(self.folder) if self.storage.is_local else scratch
        for file in self.files:
            path, problem = here / safe(file["path"]), "is missing"
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                if self.storage.is_local:
                    same = path.resolve(strict=True).is_relative_to(here.resolve()) and is_whole(path, file)
                else:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    same = self.storage.get(f"{self.folder}/{file['path']}", path, file["size"]) == file["sha256"]
                problem = "" if same else "has been altered"
            if problem:
                raise Damaged(f"{self.uri} is damaged: {file['path']} {problem}; start from another checkpoint")
        return here / self.name


def read_part(storage: Storage, folder: str, name: str, **of: str) -> Part | None:
    """Return a part of the attempt in a folder; None when its record is not whole, or not `of` that stage, say."""
    with contextlib.suppress(Damaged, KeyError):
        part = storage.read_json(f"{folder}/parts/{name}.json")
        if isinstance(part, dict) and is_sealed(part) and {"part": name, **of}.items() <= part.items():
            whose = {"stage": part["stage"], "fingerprint": part["fingerprint"]}
            return Part(storage, folder, name, whose, part["files"], part["info"], part.get("e_tags", {}))
    return None


def finished_parts(store: Storage, stage: str, fingerprint: str) -> dict[str, list[str]]:
    """Return the names of finished parts, each with the attempts that finished it."""
    found: dict[str, list[str]] = {}
    for path in sorted(store.files(store.path(stage, fingerprint, "attempts")), reverse=True):
        if record := re.fullmatch("([^/]+)/parts/(.+)[.]json", path, re.DOTALL):
            found.setdefault(record[2], []).append(record[1])
    return found


@dataclass(frozen=True)
class Artifact:
    """A committed artifact: where it is and what its manifest says."""

    store: "Store"
    stage: str
    fingerprint: str
    manifest: Json

    @property
    def uri(self) -> str:
        """Its address; `nanodlm show URI` and `nanodlm.load(uri)` take it."""
        return self.store.uri(self.stage, self.fingerprint)

    @property
    def name(self) -> str:
        """Its stage and the beginning of its fingerprint, which commands take in place of its address."""
        return f"{self.stage}/{self.fingerprint[:12]}"

    @property
    def digest(self) -> str:
        """The sha256 over the paths, sizes and sha256 of its files: equal bytes, equal digest."""
        return self.manifest["digest"]

    @property
    def metrics(self) -> Json:
        """Counts and measurements that its stage recorded."""
        return self.manifest["metrics"]

    @property
    def inputs(self) -> list[Item]:
        """Stage and fingerprint of each artifact that it was made from."""
        return [(stage, made["fingerprint"]) for stage, made in self.manifest["inputs"].items()]

    @property
    def folder(self) -> str:
        """Path of its own attempt's folder in its store."""
        return self.store.path(self.stage, self.fingerprint, "attempts", self.manifest["attempt"])

    @cached_property
    def adopted(self) -> dict[str, str]:
        """The attempts of others in which files lie, by path; on a local disk there are links in its own."""
        return {file["path"]: file["attempt"] for file in self.manifest["files"] if "attempt" in file}

    def _lies(self, path: str) -> str:
        own = self.manifest["attempt"]
        return f"attempts/{own if self.store.is_local else self.adopted.get(path, own)}/{safe(path)}"

    def remote(self, relative: str) -> str:
        """Return the path of one file in its store."""
        return self.store.path(self.stage, self.fingerprint, self._lies(relative))

    def files(self, *only: str) -> list[Json]:
        """Return `path`, `size` and `sha256` of its files: of those whose paths begin so, or of all."""
        return [file for file in self.manifest["files"] if not only or file["path"].startswith(only)]

    def problems(
        self, *only: str, deep: bool = False, emit: Emit = silent, listed: dict[str, Found] | None = None
    ) -> dict[str, str]:
        """Return what is wrong with bad files, by path: by names and sizes, with `deep` also by sha256.

        What a listing shows below its fingerprint is asked for, unless it is given.
        """
        bad, listed = {}, self.store.files(self.store.path(self.stage, self.fingerprint)) if listed is None else listed
        was_read = show_transfer(emit, f"MB of {self.stage} read", self.files(*only))
        for file in self.files(*only):
            if problem := self._problem(file, listed.get(self._lies(file["path"])), deep):
                bad[file["path"]] = problem
            if deep:
                was_read(file["size"])
        return bad

    def _problem(self, file: Json, found: Found | None, deep: bool) -> str:
        path = self.remote(file["path"])
        if found is None:
            return "is missing"
        if self.store.is_local and os.path.islink(path):
            return "is a link, which may leave its artifact"
        if found.size != file["size"]:
            return f"has {found.size} bytes, not {file['size']}"
        try:
            same = not deep or self.store.sha256(path, file["size"]) == file["sha256"]
        except OSError as error:  # a disk that fails, for one
            return f"cannot be read: {error.strerror or error}"
        return "" if same else "has been altered: its sha256 differs from the manifest's"

    def strays(self, listed: dict[str, Found]) -> list[str]:
        """Return the files among its own, of those that a listing shows, that its manifest does not name."""
        own, named = f"attempts/{self.manifest['attempt']}/", {file["path"] for file in self.manifest["files"]}
        found = {path.removeprefix(own) for path in listed if path.startswith(own)}
        return sorted(path for path in found - named if not path.startswith("parts/"))

    def parts(self) -> dict[str, str]:
        """Return the folder in its store of the attempt that finished each of its parts, by the part's name."""
        own, attempts = self.manifest["attempt"], self.store.path(self.stage, self.fingerprint, "attempts")
        if (finished := self.manifest.get("parts")) is None:  # which earlier versions did not list
            there = finished_parts(self.store, self.stage, self.fingerprint).items()
            finished = {name: own for name, attempts_of in there if own in attempts_of}
        return {name: f"{attempts}/{own if self.store.is_local else there}" for name, there in finished.items()}

    def part(self, name: str) -> Part | None:
        """Return one of its parts; None when its record, from which a repair or a training goes on, is damaged."""
        return read_part(self.store, self.parts()[name], name, stage=self.stage, fingerprint=self.fingerprint)

    def damage(self, listed: dict[str, Found] | None = None, emit: Emit = silent) -> dict[str, str]:
        """Return all that is wrong with its files and its parts' records, by path; every file is read."""
        parts = self.parts()
        lost = [name for name, part in zip(parts, self.store.together(self.part, parts), strict=True) if part is None]
        records = {f"parts/{name}.json": "is not what was recorded" for name in lost}
        return {**self.problems(deep=True, listed=listed, emit=emit), **records}

    def check(self, *only: str, deep: bool = False) -> "Artifact":
        """Return self, or raise `Damaged`, which names the first bad file and the remedy."""
        if self.store.asked and (bad := self.problems(*only, deep=deep)):
            more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            raise Damaged(self.remedy(f"{' '.join(next(iter(bad.items())))}{more}", deep=deep))
        return self

    def remedy(self, problem: str, *, deep: bool = False) -> str:
        """Return the line that says what is wrong with it and what to do."""
        command = f"nanodlm verify {self.uri} {'--deep ' if deep else ''}--repair"
        return f"the {self.stage} artifact is damaged: {problem}; `{command}` builds what is bad again"

    def local(self, *only: str) -> Path:
        """Return a local folder with its files, fetched if they are remote, each compared with its sha256."""
        self.check(*only, deep=self.store.is_local)
        return Path(self.folder) if self.store.is_local else self._fetch(self.files(*only), self.store.emit)

    def file(self, path: str) -> Path:
        """Return the local path of one of its files; see `local`."""
        return self.local(path) / path

    def on_demand(self) -> Callable[[str], Path]:
        """Return a function that does as `file`, and fetches a file of a remote store when it is first asked for."""
        if self.store.is_local:
            return self.local().joinpath
        self.check()
        return lambda path: self._fetch(self.files(path)) / path

    def _fetch(self, files: list[Json], emit: Emit = silent) -> Path:
        """Let a folder of this process in the cache hold files, and return it."""
        lacking = cache.lacking(files)
        if lacking and not self.store.asked:
            lacks = f"is not wholly in the cache ({lacking[0]['path']} is missing)"
            raise NanodlmError(f"{self.uri} {lacks}: unset NANODLM_OFFLINE")
        name = f"{self.stage}-{self.fingerprint[:16]}-{self.manifest['attempt']}"
        folder = cache.hold(name, sum(file["size"] for file in lacking))
        arrived = show_transfer(emit, f"MB of {self.stage} fetched", files)

        def take(file: Json) -> int:
            path, size = file["path"], file["size"]
            cache.take(file, folder / safe(path), lambda target: self.store.get(self.remote(path), target, size))
            return size

        try:
            for size in self.store.together(take, files):
                arrived(size)
        except FileNotFoundError as error:
            raise Damaged(self.remedy(f"a file is missing ({error})")) from error
        except Damaged as error:
            raise Damaged(self.remedy(str(error), deep=True)) from error
        except OSError as error:
            raise cache.cannot_write_cache(error) from error
        return folder
