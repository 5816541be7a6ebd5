"""What the tests of the store share."""

import pytest

from nanodlm.store import Store, new_attempt
from tests.support.helpers import fill

FILES = {"a.bin": b"first file", "b.bin": b"other file", "sub/c.bin": b"third, longer file"}


class Killed(Exception):
    """Stands for whatever ends an attempt half-way."""


Files = dict[str, bytes]  # by path


def killed_attempt(
    store: Store, parts: dict[str, Files], unfinished: Files | None = None, fingerprint: str = "f0"
) -> str:
    """An attempt that ended after these parts, and in the middle of writing some other files; returns its id."""
    with pytest.raises(Killed), new_attempt(store, "shard", fingerprint) as attempt:
        for name, files in parts.items():
            fill(attempt, files)
            attempt.finish(name, list(files), rows=len(files))
        fill(attempt, unfinished or {})
        raise Killed
    return attempt.id
