"""Times, ages and sizes as people write them."""

import re
from datetime import datetime

from nanodlm.errors import UsageError
from nanodlm.store import Artifact

AGE = r"^[0-9]+(\.[0-9]+)?[smhd]$"


def made_at(artifact: Artifact) -> float:
    """Return when an artifact was made, as a Unix time."""
    return datetime.fromisoformat(artifact.manifest["created"]).timestamp()


def size(count: int) -> str:
    """Return a number of bytes as a person reads it.

    >>> size(1_234_000)
    '1.23 MB'
    """
    for unit, length in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= length:
            return f"{count / length:.2f} {unit}"
    return f"{count} B"


def seconds(text: str) -> float:
    """Return the seconds of an age: a number with s, m, h or d behind it.

    >>> seconds("12h")
    43200.0
    """
    if not re.fullmatch(AGE, text):
        raise UsageError(f"{text!r} is no age: give a number and s, m, h or d, such as 30d")
    return float(text[:-1]) * {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}[text[-1]]
