"""Documents as flat NumPy arrays: texts, or lists of token ids."""

import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import pairwise
from typing import Any, Self, cast

import numpy as np

PIECE = 1_000_000  # values of documents that are read at a time
LOWER = bytes(range(256)).lower()


@dataclass(frozen=True)
class Documents:
    """Documents one after another: `values` are the bytes of texts in UTF-8 (uint8), or token ids (uint16, uint32).

    Document i is `values[offsets[i]:offsets[i + 1]]`; `offsets` has one number more than there are documents. `hashes`
    are those of the documents in parts, (N, 16), bytes that are uniform over contents.
    """

    values: np.ndarray
    offsets: np.ndarray
    hashes: np.ndarray = field(default_factory=lambda: np.zeros((0, 16), np.uint8))

    @classmethod
    def of(cls, array: Any) -> Self:
        """Return the documents of an Arrow array, of `large_string` or lists of ids; nothing is copied."""
        ids = hasattr(array.type, "value_type")
        _, edges, *data = array.buffers()
        offsets = np.frombuffer(edges, np.int32 if ids else np.int64)[array.offset : array.offset + len(array) + 1]
        if ids:
            return cls(array.values.to_numpy(), offsets)
        return cls(np.frombuffer(data[0] or b"", np.uint8), offsets)

    @classmethod
    def join(cls, batches: Sequence["Documents"]) -> Self:
        """Return the documents of all batches, of which there is one or more."""
        sizes = np.concatenate([batch.sizes for batch in batches])
        return cls(np.concatenate([batch.flat for batch in batches]), np.concatenate([[0], np.cumsum(sizes)]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def sizes(self) -> np.ndarray:
        """Bytes, or ids, of each document."""
        return np.diff(self.offsets)

    @property
    def flat(self) -> np.ndarray:
        """The values of all, one after another."""
        return self.values[self.offsets[0] : self.offsets[-1]]

    def __iter__(self) -> Iterator[memoryview]:
        view = memoryview(cast(Any, self.values))
        return (view[start:end] for start, end in pairwise(self.offsets.tolist()))

    def pieces(self, size: int = PIECE) -> Iterator["Documents"]:
        """Yield documents of about this many values at a time."""
        at = self.offsets[0]
        while at < self.offsets[-1]:
            first, last = np.searchsorted(self.offsets, [at, at + size])
            end = min(int(last), len(self))
            yield Documents(self.values, self.offsets[int(first) : end + 1])
            at = self.offsets[end]

    def joined(self, rows: int) -> "Documents":
        """Return runs of so many documents that follow each other, each as one document; the last may be shorter."""
        edges = [*range(0, len(self), rows), len(self)]
        hashes = [_hash(self.hashes[start:end].tobytes()) for start, end in pairwise(edges)]
        return Documents(self.values, self.offsets[edges], np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 16))

    def hashed(self) -> list[bytes]:
        """Return the hash of each, 16 bytes; texts that differ in white space, or in the case of a to z, have one."""
        if self.values.dtype == np.uint8:
            return [_hash(bytes(text).translate(LOWER, string.whitespace.encode())) for text in self]
        return [_hash(ids) for ids in Documents(self.values.astype("<i4"), self.offsets)]

    def keys(self, seed: int) -> list[bytes]:
        """Return the key of each: 16 bytes, a function of its hash and a seed only; with seed 0 it is the hash."""
        hashes = self.hashes.tobytes()
        keys = [hashes[i : i + 16] for i in range(0, len(hashes), 16)]
        return [_hash(key, seed) for key in keys] if seed else keys

    def only(self, keep: np.ndarray) -> "Documents":
        """Return those for which `keep` is true, (N,)."""
        if keep.all():
            return self
        runs = self.offsets[np.flatnonzero(np.diff(keep, prepend=False, append=False))].reshape(-1, 2)
        values = [self.values[:0], *(self.values[start:end] for start, end in runs)]
        return Documents(np.concatenate(values), np.concatenate([[0], np.cumsum(self.sizes[keep])]), self.hashes[keep])

    def halves(self, at: int) -> tuple["Documents", "Documents"]:
        """Return what lies before a place, in values from the first document's first, and what from there on.

        >>> before, after = Documents(np.arange(5, dtype=np.uint16), np.array([0, 2, 5])).halves(3)
        >>> [document.tolist() for document in before], [document.tolist() for document in after]
        ([[0, 1], [2]], [[3, 4]])
        """
        at = self.offsets[0] + at
        before, after = np.unique(np.minimum(self.offsets, at)), np.unique(np.maximum(self.offsets, at))
        hashes = self.hashes[: len(before) - 1], self.hashes[len(self) - len(after) + 1 :]
        return Documents(self.values, before, hashes[0]), Documents(self.values, after, hashes[1])


def _hash(content: bytes | memoryview, seed: int = 0) -> bytes:
    return blake2b(content, key=seed.to_bytes(8, "little"), digest_size=16).digest()
