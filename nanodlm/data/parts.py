"""The parts of a prepared corpus: Arrow files of documents, read and written piece by piece."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from nanodlm.data.documents import PIECE, Documents
from nanodlm.store import Artifact

VALIDATION = "validation.arrow"  # the file of a download that holds a validation set of its own
HASH = pa.binary(16)
SCHEMAS = {
    "text": pa.schema({"text": pa.large_string(), "hash": HASH}),
    "tokens": pa.schema({"tokens": pa.list_(pa.uint16()), "hash": HASH}),
}


def parts(download: Artifact) -> list[str]:
    """Return the names of a download's parts, in order; nothing is fetched."""
    return sorted(file["path"] for file in download.files("part-"))


def read(part: Path) -> Iterator[Documents]:
    """Read the documents of one part, `PIECE` values or little more at a time."""
    with pa.OSFile(str(part)) as file, pa.ipc.open_file(file) as reader:
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            hashes = np.frombuffer(batch.column(1).buffers()[1], np.uint8).reshape(-1, 16)
            yield replace(Documents.of(batch.column(0)), hashes=hashes)


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

    Beside each document lies its hash, so that nobody hashes it again. Equal documents give equal bytes, however many
    are written at a time.
    """

    def __init__(self, path: Path, column: str):
        """Begin a file; the column is a name of `SCHEMAS`."""
        self.schema, self.rows, self.size = SCHEMAS[column], 0, 0
        self.sizes: set[int] = set()  # the smallest and the largest of what was written at a time
        self._writer = pa.ipc.new_file(str(path), self.schema)
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
        array = pa.concat_arrays(self._waiting)
        hashes = pa.array(Documents.of(array).hashed(), HASH)
        self._writer.write_batch(pa.record_batch([array, hashes], schema=self.schema))
        self._waiting, self._waiting_size = [], 0

    def close(self) -> None:
        """Write what waits, and end the file."""
        if self._waiting:
            self._flush()
        self._writer.close()
