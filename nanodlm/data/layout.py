"""How documents are laid out in rows of L ids: one a row, or packed several to a row; what is left of a row is padding.

    document  the first L ids of each document, in a row of their own
    packed    documents, those longer than L cut every L ids, in few rows: no id is dropped

Padding is the mask's id, which no text has. A document is what ends with an end-of-text mark.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from nanodlm.config import Config
from nanodlm.data.documents import Documents

AT_ONCE = 2**22  # ids in the rows that are made together


class Laid(NamedTuple):
    """Rows that were made of a stream of ids."""

    rows: Iterable[Int[np.ndarray, "M L"]]
    end: int  # where in the stream they end
    longer: int = 0  # documents that are longer than their rows
    dropped: int = 0  # ids that are therefore in none


def lay_out(
    config: Config, stream: Int[np.ndarray, "N"], end_of_text: int, *, last: bool, held_out: bool = False
) -> Laid:
    """Lay out a stream of ids up to the last whole row, or document; when it is the `last`, that ends with it."""
    data, length = config.data, config.model.seq_len
    if data.rows == "stream":
        end = len(stream) // length * length
        return Laid([stream[:end].reshape(-1, length)], end)
    ends = np.flatnonzero(stream == end_of_text) + 1
    documents = Documents(stream, np.unique(np.concatenate([[0], ends, [len(stream)] * last]).astype(int)))
    end, longer = int(documents.offsets[-1]), int((documents.sizes > length).sum())
    if data.rows == "packed":
        documents = cut_up(documents, length)
        if not held_out:  # which are scored by a network that is not told where documents end
            return Laid([packed(documents, length, end_of_text)], end, longer)
    limit, drawn = limits(documents, length, 0.0 if held_out else data.variable_share)
    beyond = np.maximum(documents.sizes - limit, 0)
    longer = max(longer, int((beyond > 0).sum()))
    return Laid(one_a_row(documents, limit, drawn, length, end_of_text), end, longer, int(beyond.sum()))


def cut_up(documents: Documents, length: int) -> Documents:
    """Return documents with those longer than a row cut every `length` ids.

    >>> cut_up(Documents(np.arange(9), np.array([0, 2, 9])), 3).offsets.tolist()
    [0, 2, 5, 8, 9]
    """
    counts = -(-documents.sizes // length)
    starts = np.repeat(documents.offsets[:-1], counts) + length * _places(np.zeros(len(documents), int), counts)
    return Documents(documents.values, np.append(starts, documents.offsets[-1]))


def limits(
    documents: Documents, length: int, variable_share: float
) -> tuple[Int[np.ndarray, "N"], Bool[np.ndarray, "N"]]:
    """Return how many ids each document's row has, and whether that was drawn, by the document's content."""
    if not variable_share:
        return np.full(len(documents), length), np.zeros(len(documents), bool)
    hashes = np.frombuffer(b"".join(documents.hashed()), "<u4").reshape(-1, 4)
    drawn = hashes[:, 2] < variable_share * 2**32  # the split may be by what comes first in them
    # Half of these have whole rows, as samples have, the others any length.
    return np.where(drawn, np.minimum(1 + hashes[:, 3] % (2 * length), length), length), drawn


def one_a_row(
    documents: Documents, limit: Int[np.ndarray, "N"], drawn: Bool[np.ndarray, "N"], length: int, end_of_text: int
) -> Iterator[Int[np.ndarray, "M L"]]:
    """Yield a row of each document, cut at its limit; where that was drawn, marks follow a shorter text up to there.

    >>> documents = Documents(np.array([5, 9, 6, 7, 9, 8, 9]), np.array([0, 2, 5, 7]))
    >>> rows = one_a_row(documents, np.array([4, 2, 3]), np.array([False, True, True]), 4, end_of_text=9)
    >>> next(rows).tolist()
    [[5, 9, 10, 10], [6, 7, 10, 10], [8, 9, 9, 10]]
    """
    step = max(1, AT_ONCE // length)
    for first in range(0, len(documents), step):
        some = slice(first, first + step)
        sizes = np.minimum(documents.sizes, limit)[some]
        rows = np.full((len(sizes), length), end_of_text + 1, documents.values.dtype)
        rows[np.arange(length) < np.where(drawn, limit, 0)[some, None]] = end_of_text
        at = documents.offsets[:-1][some]
        rows.reshape(-1)[_places(length * np.arange(len(sizes)), sizes)] = documents.values[_places(at, sizes)]
        yield rows


def packed(documents: Documents, length: int, end_of_text: int) -> Int[np.ndarray, "M L"]:
    """Return rows of documents that are no longer than a row, each of them whole; one without a mark lies alone.

    Each document, from the longest on, goes where the least room is left that is enough (best-fit decreasing), which
    wastes next to nothing where lengths differ. Source: arXiv:2404.10830, section 3.

    >>> documents = Documents(np.array([5, 9, 6, 7, 9, 8, 9]), np.array([0, 2, 5, 7]))
    >>> packed(documents, 4, end_of_text=9).tolist()
    [[6, 7, 9, 10], [5, 9, 8, 9]]
    """
    sizes, ends = documents.sizes, documents.offsets[1:] - 1
    taken = np.where(documents.values[ends] == end_of_text, sizes, length)  # marks tell where the next one begins
    order = np.argsort(-taken, kind="stable")
    rows, with_room, room, places = 0, 0, [[] for _ in range(length + 1)], np.zeros(len(documents), int)
    for document, size in zip(order.tolist(), taken[order].tolist(), strict=True):
        if enough := with_room >> size:  # bit i of `with_room` says that a row has room for i ids
            left = size + (enough & -enough).bit_length() - 1
            row = room[left].pop()
            with_room ^= (not room[left]) << left
        else:
            left, row, rows = length, rows, rows + 1
        places[document] = (row + 1) * length - left
        room[left - size].append(row)
        with_room |= 1 << left - size
    laid = np.full(rows * length, end_of_text + 1, documents.values.dtype)
    laid[_places(places, sizes)] = documents.flat
    return laid.reshape(-1, length)


def _places(starts: Int[np.ndarray, "N"], sizes: Int[np.ndarray, "N"]) -> Int[np.ndarray, "M"]:
    """Return the numbers from each start on, as many as its size says."""
    return np.repeat(starts - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
