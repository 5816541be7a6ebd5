"""Rows of token ids as ArrayRecord files: one row a record, little-endian, random access."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from nanodlm.errors import Damaged


def dtype_for(ids: int) -> str:
    """Smallest of uint16 and uint32 that holds ids below `ids`.

    >>> dtype_for(50258)
    '<u2'
    """
    return "<u2" if ids <= 2**16 else "<u4"


def write(path: Path, rows: Iterable[np.ndarray]) -> None:
    """Write rows; equal rows give equal bytes."""
    writer = ArrayRecordWriter(str(path), "group_size:1,zstd:3")
    try:
        for row in rows:
            writer.write(row.tobytes())
    finally:
        writer.close()  # an unclosed file is empty


def read(path: Path, dtype: str) -> list[np.ndarray]:
    """All rows of a file, int32.

    Raises:
        Damaged: When it is not a whole ArrayRecord file (the reader itself would be silent).
    """
    reader = ArrayRecordReader(str(path))
    if not reader.ok():  # not to be closed: that raises what is wrong in the reader's own words
        raise Damaged(f"{path} is not a whole ArrayRecord file: rebuild it with --rebuild shard")
    try:
        return [np.frombuffer(record, dtype).astype(np.int32) for record in reader.read_all()]
    finally:
        reader.close()
