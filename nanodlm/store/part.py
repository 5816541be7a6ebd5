"""Finished parts of attempts (shards, checkpoints): a later attempt adopts them, for what they hold is recorded."""

import contextlib
from dataclasses import dataclass, field, replace
from pathlib import Path

from nanodlm.errors import Damaged
from nanodlm.store.disk import is_whole
from nanodlm.store.files import Storage
from nanodlm.store.manifest import Json, digest_of, is_sealed, safe, sealed


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

    def local(self, scratch: Path) -> Path:
        """Return a local folder with its files, each compared with its sha256; remote ones are copied to `scratch`."""
        here = Path(self.folder) if self.storage.is_local else scratch
        for file in self.files:
            path, problem = here / safe(file["path"]), "is missing"
            with contextlib.suppress(FileNotFoundError):
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


def record_part(storage: Storage, folder: str, part: Part, e_tags: dict[str, str] | None = None) -> Part:
    """Record that the attempt in a folder has the files of a part, and return it there."""
    there = replace(part, storage=storage, folder=folder, e_tags=e_tags or {})
    record = {**part.of, "part": part.name, "files": part.files, "info": part.info, "e_tags": there.e_tags}
    storage.write_json(f"{folder}/parts/{part.name}.json", sealed(record))
    return there


def finished_parts(store: Storage, stage: str, fingerprint: str) -> dict[str, list[str]]:
    """Return the names of finished parts, each with the attempts that finished it."""
    found: dict[str, list[str]] = {}
    for relative in sorted(store.sizes(store.path(stage, fingerprint, "attempts")), reverse=True):
        attempt, _, rest = relative.partition("/")
        if rest.startswith("parts/") and rest.endswith(".json"):
            found.setdefault(rest.removeprefix("parts/").removesuffix(".json"), []).append(attempt)
    return found
