"""Runs of words that texts have in common, as hashes in flat NumPy arrays: which texts are near duplicates.

A text is compared by the set of its runs of five words. Of two sets the Jaccard index, what they have in common over
what they have together, is estimated by MinHash (Broder, 1997): the share of 128 orders of all runs in which both
sets have the same first one. Eight bits of each first one are kept (Li and König, 2010).
"""

import numpy as np

from nanodlm.data.documents import LOWER, Documents

RUN = 5  # words
BANDS = 32  # groups of four hashes: of runs in common to 0.5, near duplicates share one in 87% of cases, to 0.7 in all
# What begins a word (2: a Chinese or Japanese character), goes on with one (1), or is none.
KIND = np.array([2 if 0xE3 <= i <= 0xE9 else i >= 0x80 or chr(i).isalnum() for i in range(256)], np.uint8)
VALUES = np.random.PCG64(1).random_raw(256)[np.frombuffer(LOWER, np.uint8)] * (KIND > 0)
FACTORS = np.random.PCG64(2).random_raw(4 * BANDS) | np.uint64(1)
STEP, BACK = (np.uint64(number) for number in (0x9E3779B97F4A7C15, pow(0x9E3779B97F4A7C15, -1, 2**64)))


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Return numbers (uint64) of which each bit depends on many."""
    numbers = (numbers ^ (numbers >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return numbers ^ (numbers >> np.uint64(32))


def words(documents: Documents, size: int = 20_000) -> Documents:
    """Return a hash (uint64) of each word: letters and digits whatever their case, or one id; `size` of them at a time.

    >>> one, other = words(Documents(np.frombuffer(b"A horse! a HORSE", np.uint8), np.array([0, 8, 16])))
    >>> one == other, len(one)
    (True, 2)
    """
    flat, offsets = documents.flat, documents.offsets - documents.offsets[0]
    if flat.dtype != np.uint8:
        return Documents(_mixed(flat.astype(np.uint64)), offsets)
    if len(signs := np.flatnonzero(flat == 0xE2)):  # U+2000 to U+2FFF: dashes, quotation marks and the like
        flat = flat.copy()
        flat[signs[:, None] + np.arange(3)] = ord(" ")
    kind = KIND[flat]
    before = np.append(np.uint8(0), kind[:-1])
    before[offsets[:-1]] = 0
    starts = np.flatnonzero((kind == 2) | (kind > before))
    edges, hashes = np.append(starts, len(flat)), [np.zeros(0, np.uint64)]
    for i in range(0, len(starts), size):  # a word's hash is a polynomial of its bytes
        at = edges[i : i + size + 1]
        values, at = VALUES[flat[at[0] : at[-1]]], at[:-1] - at[0]
        powers, back = (np.cumprod(np.full(len(values), base)) for base in (STEP, BACK))
        hashes.append(_mixed(np.add.reduceat(values * powers, at) * back[at]))
    return Documents(np.concatenate(hashes), np.searchsorted(starts, offsets))


def runs(documents: Documents, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a hash of each run of so many words, or ids, in a document, and the document's number, (N,) each."""
    found = words(documents)
    owner = np.repeat(np.arange(len(found)), found.sizes)
    count = max(0, len(owner) - size + 1)
    hashes = np.zeros(count, np.uint64)
    for i in range(size):
        hashes = hashes * STEP + found.values[i : i + count]
    inside = owner[:count] == owner[size - 1 :]
    return _mixed(hashes[inside]), owner[:count][inside]


def contains(ordered: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Say which numbers, (N,), are in a sorted array."""
    at = np.searchsorted(ordered, numbers)
    found = at < len(ordered)
    found[found] = ordered[at[found]] == numbers[found]
    return found


class Seen:
    """Numbers that have been met, 8 bytes each, in sorted arrays, each at least twice as long as the next."""

    def __init__(self) -> None:
        self._sorted: list[np.ndarray] = []

    def first(self, numbers: np.ndarray) -> np.ndarray:
        """Say which of these numbers, (N,), are met for the first time."""
        new = np.zeros(len(numbers), bool)
        new[np.unique(numbers, return_index=True)[1]] = True
        for known in self._sorted:
            new &= ~contains(known, numbers)
        added = numbers[new]
        while self._sorted and len(self._sorted[-1]) < 2 * len(added):
            added = np.concatenate([self._sorted.pop(), added])
        self._sorted.append(np.sort(added))
        return new


def signatures(documents: Documents) -> np.ndarray:
    """Return the MinHash of documents, (N, 128), uint8; those of fewer than five words are like equal ones only."""
    result = np.tile(np.frombuffer(b"".join(documents.hashed()), np.uint8).reshape(-1, 16), len(FACTORS) // 16)
    hashes, owner = runs(documents, RUN)
    if len(first := np.flatnonzero(np.diff(owner, prepend=-1))):
        for column, factor in enumerate(FACTORS):
            result[owner[first], column] = _mixed(np.minimum.reduceat(hashes * factor, first)) >> np.uint64(56)
    return result


def apart(found: np.ndarray, share: float) -> np.ndarray:
    """Say of signatures, (N, 128), which are unlike all kept before them: what is left out is like one that is kept."""
    keep, rest = np.ones(len(found), bool), np.arange(len(found))
    while len(rest):
        among = found[rest] if len(rest) < len(found) else found
        like = np.arange(len(rest))  # the earliest that each is found to be like
        for band in among.view(np.uint32).T:
            _, first, group = np.unique(band, return_index=True, return_inverse=True)
            earlier = first[group]
            for i in np.array_split(at := np.flatnonzero(earlier < like), len(at) // 100_000 + 1):
                close = (among[i] == among[earlier[i]]).mean(1) >= share
                like[i[close]] = earlier[i[close]]
        own = like == np.arange(len(rest))
        keep[rest[~own & own[like]]] = False
        rest = rest[~own & ~own[like]]  # they are like one that is left out, and so may have to be kept
    return keep
