"""Files that commands write where they are told to: what cannot be written is said before the work, and in one line."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from nanodlm.errors import UsageError, full_disk_named


def check_file(file: str, *, is_folder: bool = False) -> None:
    """Refuse a file that cannot be written, or a folder that cannot be made and filled, before any work; "" is none."""
    path = Path(file)
    if not file:
        return
    if is_folder:
        there = next(one for one in (path, *path.absolute().parents) if one.exists())
        wrong = "" if there.is_dir() else f"{there} is no folder"
    else:
        there = path if path.exists() else path.parent
        wrong = "" if path.exists() or there.is_dir() else f"there is no folder {there}"
        wrong = "it is a folder" if path.is_dir() else wrong
    if not wrong and not os.access(there, os.W_OK):
        wrong = f"{there} is not writable"
    if wrong:
        raise UsageError(f"cannot write {file}: {wrong}")


@contextlib.contextmanager
def writing(file: str) -> Iterator[None]:
    """Turn what the block raises when a file cannot be written into one line that names it."""
    try:
        with full_disk_named(file):
            yield
    except OSError as error:
        raise UsageError(f"cannot write {file}: {error.strerror or error}") from error
