"""The last tenth of a corpus in the order of its source, which is held out where a million tokens would be too much."""

from collections.abc import Iterable, Iterator
from typing import Any

from nanodlm.data import download
from nanodlm.store import Artifact

Place = list[int]  # a part, a document of it, and how many characters (or ids) of that document come before


def last_tenth(corpus: Artifact) -> Place:
    """Return where the last tenth of a corpus begins, by bytes of text (at the edge of a character) or by ids."""
    folder = corpus.local()
    paths = [folder / name for name in download.parts(corpus)]
    total = sum(len(_units(document)) for path in paths for document in download.documents(path))
    left = total * 9 // 10
    for part, path in enumerate(paths):
        for row, document in enumerate(download.documents(path)):
            units = _units(document)
            if left < len(units):
                front = units[:left]
                offset = len(front.decode(errors="ignore")) if isinstance(front, bytes) else left
                return [part, row, offset]
            left -= len(units)
    raise AssertionError("a corpus holds a document")


def _units(document: str | list[int]) -> bytes | list[int]:
    return document.encode() if isinstance(document, str) else document


def halves(corpus: Artifact, place: Place) -> Iterator[tuple[Any, Any]]:
    """Yield what of each document of a corpus lies before a place, and what from there on; one of them may be empty."""
    folder = corpus.local()
    for part, name in enumerate(download.parts(corpus)):
        yield from halves_of_part(download.documents(folder / name), part, place)


def halves_of_part(documents: Iterable[Any], part: int, place: Place) -> Iterator[tuple[Any, Any]]:
    """Yield the halves of the documents of one part; nothing of other parts is needed.

    >>> list(halves_of_part(["one", "two", "three"], 4, [4, 1, 2]))
    [('one', ''), ('tw', 'o'), ('', 'three')]
    """
    for row, document in enumerate(documents):
        here = [part, row]
        at = place[2] if here == place[:2] else len(document) if here < place[:2] else 0
        yield document[:at], document[at:]
