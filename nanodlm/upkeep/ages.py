"""Times, ages and sizes as people write them."""

import re
import time
from datetime import UTC, datetime

from nanodlm.errors import UsageError
from nanodlm.store import Artifact


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _time(text: str) -> float:
    """Unix time of a manifest's time stamp."""
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()


def age(artifact: Artifact) -> float:
    """Seconds since an artifact was made."""
    return time.time() - _time(artifact.manifest["created"])


def size(count: int) -> str:
    """Bytes, for a person.

    >>> size(1_234_000)
    '1.23 MB'
    """
    for unit, length in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= length:
            return f"{count / length:.2f} {unit}"
    return f"{count} B"


AGE = r"^[0-9]+(\.[0-9]+)?[smhd]$"


def seconds(text: str) -> float:
    """Of an age.

    Raises:
        UsageError: When it is no number with s, m, h or d behind it.

    >>> seconds("12h")
    43200.0
    """
    units = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
    if not re.fullmatch(AGE, text):
        raise UsageError(f"{text!r} is no age: give a number and s, m, h or d, such as 30d")
    return float(text[:-1]) * units[text[-1]]
