"""What the tests of the store share."""

import pytest

from nanodlm.store import Artifact, Store, new_attempt
from tests.support.helpers import fill

FILES = {"a.bin": b"first file", "b.bin": b"other file", "sub/c.bin": b"third, longer file"}


class Killed(Exception):
    """Stands for whatever ends an attempt half-way."""


def killed_attempt(store: Store, parts: dict[str, dict[str, bytes]], fingerprint: str = "f0") -> str:
    """An attempt that ended after these parts, and in the middle of writing another file; returns its id."""
    with pytest.raises(Killed), new_attempt(store, "shard", fingerprint) as attempt:
        for name, files in parts.items():
            fill(attempt, files)
            attempt.finish(name, list(files), rows=len(files))
        fill(attempt, {"unfinished": b"half writ"})
        raise Killed
    return attempt.id


def read(artifact: Artifact) -> dict[str, bytes]:
    """An artifact's files, as a reader gets them."""
    folder, paths = artifact.local(), [file["path"] for file in artifact.files()]
    return {path: (folder / path).read_bytes() for path in paths if "parts/" not in path}
