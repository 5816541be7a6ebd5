"""Finished parts of attempts (shards, checkpoints): a later attempt adopts them after checking their sha256."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanodlm.errors import Damaged
from nanodlm.store.cache import whole
from nanodlm.store.files import Storage
from nanodlm.store.manifest import _digest, _safe, sealed


def _within(folder: Path, path: Path) -> bool:
    """Whether a local path lies in a folder, links followed."""
    return path.resolve().is_relative_to(folder.resolve())


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


def finished_parts(store: Storage, stage: str, fingerprint: str, since: str = "") -> dict[str, list[str]]:
    """Names of the parts that attempts have finished, each with the attempts that did, newest first.

    Args:
        store: Where it lies.
        stage: The artifact's stage.
        fingerprint: Its fingerprint.
        since: Leave out attempts up to this one.
    """
    found: dict[str, list[str]] = {}
    for relative in sorted(store.sizes(store.path(stage, fingerprint, "attempts")), reverse=True):
        attempt, _, rest = relative.partition("/")
        if since < attempt and rest.startswith("parts/") and rest.endswith(".json"):
            found.setdefault(rest.removeprefix("parts/").removesuffix(".json"), []).append(attempt)
    return found
