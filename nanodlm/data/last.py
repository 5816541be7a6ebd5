"""The last tenth of a small corpus, in the order of its source: where it begins, and what lies on either side."""

from collections.abc import Iterable, Iterator
from typing import Any

from nanodlm.data import download
from nanodlm.store import Artifact

Place = list[int]  # a part, a document of it, and how many characters (or ids) of that document come before


def last_tenth(corpus: Artifact) -> Place:
    """Return where the last tenth of a corpus begins, by bytes of text (at the edge of a character) or by ids."""
    units = [[d.encode() if isinstance(d, str) else d for d in part] for part in download.by_part(corpus)]
    part, row, left = 0, 0, sum(len(document) for documents in units for document in documents) * 9 // 10
    while left >= len(units[part][row]):
        left -= len(units[part][row])
        part, row = (part, row + 1) if row + 1 < len(units[part]) else (part + 1, 0)
    before = units[part][row][:left]
    return [part, row, len(before.decode(errors="ignore") if isinstance(before, bytes) else before)]


def halves(documents: Iterable[Any], part: int, place: Place) -> Iterator[tuple[Any, Any]]:
    """Yield what of each document of a part lies before a place, and what from there on; one of them may be empty.

    >>> list(halves(["one", "two", "three"], 4, [4, 1, 2]))
    [('one', ''), ('tw', 'o'), ('', 'three')]
    """
    for row, document in enumerate(documents):
        here = [part, row]
        at = place[2] if here == place[:2] else len(document) if here < place[:2] else 0
        yield document[:at], document[at:]
