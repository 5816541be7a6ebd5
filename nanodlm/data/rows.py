"""Rows of token ids as ArrayRecord files: one row a record, little-endian, random access."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from nanodlm.errors import Damaged

OPEN = 64  # files that are open at once: those that are read together, and not as many as a process may have


def dtype_for(ids: int) -> str:
    """Return the smallest of uint16 and uint32 that holds ids below `ids`."""
    return "<u2" if ids <= 2**16 else "<u4"


def write(path: Path, rows: Iterable[np.ndarray]) -> None:
    """Write rows to a file; equal rows give equal bytes."""
    with closing(ArrayRecordWriter(str(path), "group_size:1,zstd:3")) as writer:  # an unclosed file is empty
        for row in rows:
            writer.write(row.tobytes())


def evenly_spaced(n: int, count: int | None) -> np.ndarray:
    """Return `count` of n places, from the first to the last, or all when there are no more: (min(n, count),).

    >>> evenly_spaced(10, 4).tolist()
    [0, 3, 6, 9]
    """
    return np.arange(n) if count is None or count >= n else np.linspace(0, n - 1, count).round().astype(int)


def name(part: int) -> str:
    """Return the file name of the training shard that is made of a part, such as `train-00003.arrayrecord`."""
    return f"train-{part:05d}.arrayrecord"


def opener(fetch: Callable[[str], Path]) -> Callable[[str], Any]:
    """Return a function that opens a file by its name, given what gives its local path, and keeps the last `OPEN`."""
    import grain.python as grain  # slow, and loads JAX

    return lru_cache(OPEN)(lambda file: grain.ArrayRecordDataSource([str(fetch(file))]))


class Rows:
    """The records of several files one after the other, by number; a file is fetched when it is first read."""

    def __init__(self, counts: Mapping[str, int], opened: Callable[[str], Any]):
        """Take the number of rows of each file, and what `opener` gives."""
        self._names, self._ends, self._opened = list(counts), list(accumulate(counts.values())), opened

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> bytes:
        file = bisect_right(self._ends, index)
        return self._opened(self._names[file])[index - (self._ends[file - 1] if file else 0)]


def read(path: Path, dtype: str) -> list[np.ndarray]:
    """Read all rows of a file, as int32."""
    reader = ArrayRecordReader(str(path))
    if not reader.ok():  # not to be closed: that raises what is wrong in the reader's own words
        raise Damaged(f"{path} is not a whole ArrayRecord file: rebuild it with --rebuild shard")
    with closing(reader):
        return [np.frombuffer(record, dtype).astype(np.int32) for record in reader.read_all()]
