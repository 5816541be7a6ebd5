"""Finished parts of attempts (shards, checkpoints): a later attempt adopts them, for what they hold is recorded."""

import contextlib
import re
from dataclasses import dataclass, field
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
