"""Documents as they lie in a prepared corpus: Arrow files of texts or token ids, read as flat NumPy arrays."""

import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import pyarrow as pa

from nanodlm.store import Artifact

LOWER = bytes(range(256)).lower()
PIECE = 1_000_000  # values of documents that are read at a time
VALIDATION = "validation.arrow"  # the file of a download that holds a validation set of its own
SCHEMAS = {"text": pa.schema({"text": pa.large_string()}), "tokens": pa.schema({"tokens": pa.list_(pa.uint16())})}


@dataclass(frozen=True)
class Documents:
    """Documents one after another: `values` are the bytes of texts in UTF-8 (uint8), or token ids (uint16, uint32).

    Document i is `values[offsets[i]:offsets[i + 1]]`; `offsets` has one number more than there are documents.
    """

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, array: pa.Array) -> Self:
        """Return the documents of an Arrow array of one of the `SCHEMAS`; nothing is copied."""
        ids = pa.types.is_list(array.type)
        _, edges, *data = array.buffers()
        offsets = np.frombuffer(edges, np.int32 if ids else np.int64)[array.offset : array.offset + len(array) + 1]
        if ids:
            return cls(cast(pa.ListArray, array).values.to_numpy(), offsets)
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
        return Documents(self.values, self.offsets[edges])

    def keys(self, seed: int) -> list[bytes]:
        """Return the key of each: 16 bytes, uniform over contents, a function of content and seed only.

        Texts that differ in white space, or in the case of a to z, have one key.
        """
        key = seed.to_bytes(8, "little")
        if self.values.dtype == np.uint8:
            contents = (bytes(text).translate(LOWER, string.whitespace.encode()) for text in self)
        else:
            contents = iter(Documents(self.values.astype("<i4"), self.offsets))
        return [blake2b(content, key=key, digest_size=16).digest() for content in contents]

    def only(self, keep: np.ndarray) -> "Documents":
        """Return those for which `keep` is true, (N,)."""
        if keep.all():
            return self
        runs = self.offsets[np.flatnonzero(np.diff(keep, prepend=False, append=False))].reshape(-1, 2)
        values = [self.values[:0], *(self.values[start:end] for start, end in runs)]
        return Documents(np.concatenate(values), np.concatenate([[0], np.cumsum(self.sizes[keep])]))

    def halves(self, at: int) -> tuple["Documents", "Documents"]:
        """Return what lies before a place, in values from the first document's first, and what from there on.

        >>> before, after = Documents(np.arange(5, dtype=np.uint16), np.array([0, 2, 5])).halves(3)
        >>> [document.tolist() for document in before], [document.tolist() for document in after]
        ([[0, 1], [2]], [[3, 4]])
        """
        at = self.offsets[0] + at
        clipped = (np.minimum(self.offsets, at), np.maximum(self.offsets, at))
        before, after = (Documents(self.values, np.unique(offsets)) for offsets in clipped)
        return before, after


def parts(download: Artifact) -> list[str]:
    """Return the names of a download's parts, in order; nothing is fetched."""
    return sorted(file["path"] for file in download.files("part-"))


def read(part: Path) -> Iterator[Documents]:
    """Read the documents of one part, `PIECE` values or little more at a time."""
    with pa.OSFile(str(part)) as file, pa.ipc.open_file(file) as reader:
        for number in range(reader.num_record_batches):
            yield Documents.of(reader.get_batch(number).column(0))


def corpus(download: Artifact) -> Iterator[Documents]:
    """Read all documents of a download, in order."""
    folder = download.local()
    for name in parts(download):
        yield from read(folder / name)


def filling(array: pa.Array, room: float) -> int:
    """Return how many documents fill so many values: the last of them reaches that, or there is one more than all."""
    return int(np.searchsorted(np.cumsum(Documents.of(array).sizes), room)) + 1


class Writer:
    """A part that is being written, to be closed; `rows` and `size` count its documents and their values.

    Equal documents give equal bytes, however many are written at a time.
    """

    def __init__(self, path: Path, column: str):
        """Begin a file; the column is a name of `SCHEMAS`."""
        options: Any = pa.ipc.IpcWriteOptions(compression="lz4" if column == "text" else None)
        self.schema, self.rows, self.size = SCHEMAS[column], 0, 0
        self.sizes: set[int] = set()  # the smallest and the largest of what was written at a time
        self._writer = pa.ipc.new_file(str(path), self.schema, options=options)
        self._waiting: list[pa.Array] = []  # what will be read at a time
        self._waiting_size = 0

    def write(self, array: pa.Array) -> None:
        """Add documents."""
        while len(array):
            fits = filling(array, PIECE - self._waiting_size)
            taken, array = array[:fits], array[fits:]
            self._waiting.append(taken)
            sizes = Documents.of(taken).sizes
            self.sizes |= {int(sizes.min()), int(sizes.max())}
            size = int(sizes.sum())
            self.rows += len(taken)
            self.size += size
            self._waiting_size += size
            if self._waiting_size >= PIECE:
                self._flush()

    def _flush(self) -> None:
        self._writer.write_batch(pa.record_batch([pa.concat_arrays(self._waiting)], schema=self.schema))
        self._waiting, self._waiting_size = [], 0

    def close(self) -> None:
        """Write what waits, and end the file."""
        if self._waiting:
            self._flush()
        self._writer.close()
