"""Rows of token ids as ArrayRecord files: one row a record, little-endian, random access."""

import resource
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import chain
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from nanodlm.errors import Damaged

GROUP = 1024  # tokens that are stored, and so read, together: smaller groups take more room, larger ones longer


def dtype_for(ids: int) -> str:
    """Return the smallest of uint16 and uint32 that holds ids below `ids`."""
    return "<u2" if ids <= 2**16 else "<u4"


def write(path: Path, rows: Iterable[np.ndarray]) -> None:
    """Write rows to a file: an array (N, L), or arrays of which each is a row or such; equal rows give equal bytes."""
    arrays = iter([rows] if isinstance(rows, np.ndarray) else rows)
    first = next(arrays, np.empty((0, 1)))
    options = f"group_size:{max(1, GROUP // first.shape[-1])},uncompressed"
    with closing(ArrayRecordWriter(str(path), options)) as writer:  # an unclosed file is empty
        for array in chain([first], arrays):
            data, size = array.tobytes(), array.shape[-1] * array.itemsize
            for start in range(0, len(data), size):
                writer.write(data[start : start + size])


def evenly_spaced(n: int, count: int | None) -> np.ndarray:
    """Return `count` of n places, from the first to the last, or all when there are no more: (min(n, count),).

    >>> evenly_spaced(10, 4).tolist()
    [0, 3, 6, 9]
    """
    return np.arange(n) if count is None or count >= n else np.linspace(0, n - 1, count).round().astype(int)


def name(part: int) -> str:
    """Return the file name of the training shard that is made of a part, such as `train-00003.arrayrecord`."""
    return f"train-{part:05d}.arrayrecord"


def open_files() -> int:
    """Return how many files of rows may stay open: half of what this process may have, for others need some too."""
    return max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)  # without a limit it is negative


def open_rows(path: Path) -> ArrayRecordReader:
    """Open a file whose rows are read in any order; it is closed with the last reference."""
    reader = ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
    if not reader.ok():  # not to be closed: that raises what is wrong in the reader's own words
        raise Damaged(f"{path} is not a whole ArrayRecord file: rebuild it with --rebuild shard")
    return reader


def stream(path: Path, dtype: str, tokens: int = 1 << 20) -> Iterator[np.ndarray]:
    """Yield the rows of a file whose rows are of one length, about so many tokens at a time: (R, L) each."""
    with closing(open_rows(path)) as reader:
        size = len(reader.read(0, 1)[0]) // np.dtype(dtype).itemsize if reader.num_records() else 1
        for start in range(0, reader.num_records(), step := max(1, tokens // size)):
            records = reader.read(start, min(start + step, reader.num_records()))
            yield np.frombuffer(b"".join(records), dtype).reshape(len(records), -1)


def read(path: Path, dtype: str) -> list[np.ndarray]:
    """Read all rows of a file, as int32."""
    with closing(open_rows(path)) as reader:
        return [np.frombuffer(record, dtype).astype(np.int32) for record in reader.read_all()]
