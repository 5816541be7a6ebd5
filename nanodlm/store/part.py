"""Finished parts of attempts (shards, checkpoints): a later attempt adopts them after checking their sha256."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from nanodlm.errors import Damaged
from nanodlm.store.disk import is_whole, is_within
from nanodlm.store.files import Storage
from nanodlm.store.manifest import Json, digest_of, safe, sealed


@dataclass(frozen=True)
class Part:
    """A finished part of an attempt: its files, each with size and sha256, and the `info` it was finished with."""

    storage: Storage  # its root is the attempt's folder
    name: str
    files: list[Json]
    info: Json

    @property
    def uri(self) -> str:
        """Its address: a plain path on local disk, else a URL."""
        return self.storage.uri(self.name)

    @property
    def digest(self) -> str:
        """The sha256 over the paths, sizes and sha256 of its files."""
        return digest_of(self.files, [])

    def local(self, scratch: Path) -> Path:
        """Return a local folder with its files, each compared with its sha256; remote ones are copied to `scratch`."""
        folder = Path(self.storage.root) if self.storage.is_local else scratch
        for file in self.files:
            path = folder / safe(file["path"])
            if not self.storage.is_local:
                with contextlib.suppress(FileNotFoundError):
                    self.storage.get([(self.storage.path(file["path"]), path)])
            problem = "is missing" if not path.is_file() else "" if is_whole(path, file) else "has been altered"
            if not problem and not is_within(folder, path):
                problem = "is a link that leaves it"
            if problem:
                raise Damaged(f"{self.uri} is damaged: {file['path']} {problem}; start from another checkpoint")
        return folder / self.name


def read_part(storage: Storage, path: str, **of: str) -> Json | None:
    """Return the record of a finished part; None when it is not whole, or not `of` that stage, fingerprint, name."""
    part = storage.read_json(path)
    if not isinstance(part, dict) or not part.keys() >= {"files", "info"} or part != sealed(part):
        return None
    return part if of.items() <= part.items() else None


def finished_parts(
    store: Storage, stage: str, fingerprint: str, since: str = "", but: str = ""
) -> dict[str, list[str]]:
    """Return the names of finished parts, each with the attempts after `since`, newest first, that finished it."""
    found: dict[str, list[str]] = {}
    for relative in sorted(store.sizes(store.path(stage, fingerprint, "attempts")), reverse=True):
        attempt, _, rest = relative.partition("/")
        if since < attempt != but and rest.startswith("parts/") and rest.endswith(".json"):
            found.setdefault(rest.removeprefix("parts/").removesuffix(".json"), []).append(attempt)
    return found
