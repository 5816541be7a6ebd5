"""The formats of files: what each holds row by row, read piece by piece.

A reader of rows is a generator of (line, value), one of columns of (lines, Arrow array). A new format is one of these
in `ROWS` or `COLUMNS`, and its suffix in `sources.READERS`.
"""

import codecs
import contextlib
import csv
import io
import json
import lzma
import mmap
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import groupby
from typing import Any, BinaryIO, cast

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from nanodlm.config import DataConfig
from nanodlm.data.sources import READERS, file_system, format_of, opened
from nanodlm.errors import NanodlmError

BATCH_BYTES = 2_000_000  # or what a part holds, if that is less
BATCH_ROWS = 4096
CHUNK = 1 << 20  # bytes that are asked of a file at once
CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
BETWEEN = re.compile(r"[\s,]*")  # rows of a JSON array


@dataclass
class Fault:
    """What stands in place of a row's value that could not be had; `names` are the fields that the row has instead."""

    why: str
    names: list[str] | None = None


def batch_bytes(data: DataConfig) -> int:
    """Return about how many bytes a batch holds."""
    return int(min(BATCH_BYTES, data.part_mb * 1e6))


def batches(url: str, data: DataConfig) -> Iterator[tuple[Sequence[int], Any]]:
    """Read a file's rows: numbers that say where they are, and an Arrow array or a list of as many values."""
    name = READERS[format_of(url)[0]]
    if name in COLUMNS:
        with _on_disk(url) as file:
            yield from COLUMNS[name](file, url, data)
        return
    with _unpacked(url) as file:
        if file.peek(3)[:3] == codecs.BOM_UTF8:
            file.read(3)
        numbers, values, size = [], [], 0
        for number, value in ROWS[name](file, url, data):
            numbers.append(number)
            values.append(value)
            size += len(value) if isinstance(value, Sized) else 0
            if size >= batch_bytes(data) or len(values) == BATCH_ROWS:
                yield numbers, values
                numbers, values, size = [], [], 0
        if values:
            yield numbers, values


@contextlib.contextmanager
def _unpacked(url: str) -> Iterator[io.BufferedReader]:
    packing = format_of(url)[1]
    with opened(url) as file:
        raw: Any = file
        if packing == ".xz":
            raw = lzma.open(file)
        elif packing:
            raw = pa.CompressedInputStream(pa.PythonFile(file, "r"), CODECS[packing])
        yield io.BufferedReader(raw, CHUNK)


@contextlib.contextmanager
def _on_disk(url: str) -> Iterator[Any]:
    """Open a file that is not read in order; one that is packed, or elsewhere, is copied first."""
    fs, path = file_system(url)
    if isinstance(fs, LocalFileSystem) and not format_of(url)[1]:
        with open(path, "rb") as file:
            yield file
        return
    with tempfile.TemporaryFile() as copy:
        with _unpacked(url) as file:
            shutil.copyfileobj(file, copy, CHUNK)
        copy.seek(0)
        yield copy


def _text(file: BinaryIO, url: str, data: DataConfig) -> Iterator[tuple[int, bytes]]:
    """Read a file as one document, or its lines, which end at a line feed only, or its paragraphs, in blank lines."""
    if data.sample_by == "document":
        yield 1, file.read()
    elif data.sample_by == "line":
        yield from ((i, b"" if line == b"\r\n" else line.removesuffix(b"\n")) for i, line in enumerate(file, 1))
    else:
        for blank, lines in groupby(enumerate(file, 1), lambda numbered: numbered[1] in (b"\n", b"\r\n")):
            begin, first = next(lines)
            if not blank:
                yield begin, b"".join([first, *(line for _, line in lines)]).removesuffix(b"\n")


def _jsonl(file: BinaryIO, url: str, data: DataConfig) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, 1):
        if line.isspace():
            continue
        try:
            row = orjson.loads(line)
        except ValueError:  # NaN, a lone surrogate or a byte that is no UTF-8 may be in a field that nobody reads
            try:
                row = json.loads(line.decode(errors="surrogateescape"), strict=False)
            except (ValueError, RecursionError):
                yield number, Fault("not JSON")
                continue
        yield number, _member(row, data.column)


def _member(row: Any, column: str) -> Any:
    """Return a field of a parsed row, or one of a field of it, as the Fault that it is not there."""
    value, names = row, [column] if isinstance(row, dict) and column in row else column.split(".")
    for name in names:
        if not isinstance(value, dict) or name not in value:
            return Fault(f"without {column!r}", [*row]) if isinstance(row, dict) else Fault("not a JSON object")
        value = value[name]
    return value


def _json(file: io.BufferedReader, url: str, data: DataConfig) -> Iterator[tuple[int, Any]]:
    """Read an array, piece by piece, or else lines; an array's rows are numbered."""
    if not file.peek(CHUNK).lstrip().startswith(b"["):
        yield from _jsonl(file, url, data)
        return
    decode, parse = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode, json.JSONDecoder(strict=False)
    text, at, number = decode(file.read(CHUNK)).lstrip()[1:], 0, 0
    while True:
        at = cast(re.Match[str], BETWEEN.match(text, at)).end()
        if text.startswith("]", at):
            break
        try:
            row, at = parse.raw_decode(text, at)
        except ValueError:  # the row goes on in the next piece
            if not (piece := file.read(max(CHUNK, len(text) - at))):
                raise
            text, at = text[at:] + decode(piece), 0
            continue
        number += 1
        yield number, _member(row, data.column)
    if text[at + 1 :].strip() or file.read(CHUNK).strip():
        raise ValueError("something follows the end of the array")


def _csv(file: io.BufferedReader, url: str, data: DataConfig) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(sys.maxsize)
    with io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="\n") as lines:
        rows = csv.reader(lines, strict=True)
        names = next(rows, [])
        if data.column not in names:
            raise no_column(url, data.column, names)
        at = names.index(data.column)
        while True:
            begin = rows.line_num + 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield begin, Fault(f"not CSV, {error}")
                continue
            if row:
                yield begin, row[at] if at < len(row) else Fault(f"without {data.column!r}")


def _parquet(file: Any, url: str, data: DataConfig) -> Iterator[tuple[range, pa.Array]]:
    """Read a column in batches, through a buffer that is small however large the row groups are."""
    with pq.ParquetFile(file, pre_buffer=False, buffer_size=CHUNK) as parquet:
        names, begin = _path(parquet.schema_arrow, url, data.column), 1
        for group in range(parquet.num_row_groups):
            about = parquet.metadata.row_group(group)
            leaves = [about.column(i) for i in range(about.num_columns)]
            leaves = [leaf for leaf in leaves if f"{leaf.path_in_schema}.".startswith(f"{data.column}.")]
            size = sum(leaf.total_uncompressed_size for leaf in leaves)
            count = max(1, min(2 * batch_bytes(data) * about.num_rows // max(size, 1), BATCH_ROWS // 4))
            for batch in parquet.iter_batches(count, row_groups=[group], columns=[data.column], use_threads=False):
                yield range(begin, begin := begin + len(batch)), _leaf(batch, names)


def _arrow(file: Any, url: str, data: DataConfig) -> Iterator[tuple[range, pa.Array]]:
    """Read a column of an IPC file, or of a stream, as `datasets` saves; a part of a mapped file takes no memory."""
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # closed when nothing is left that lies in it
    whole = mapped[:6] == b"ARROW1"
    reader = (pa.ipc.open_file if whole else pa.ipc.open_stream)(pa.py_buffer(mapped))
    names, begin = _path(reader.schema, url, data.column), 1
    batches = map(reader.get_batch, range(reader.num_record_batches)) if whole else reader
    for array in (_leaf(batch, names) for batch in batches):
        count = max(1, min(batch_bytes(data) * len(array) // max(array.nbytes, 1), BATCH_ROWS))
        for start in range(0, len(array), count):
            piece = array.slice(start, count)
            yield range(begin, begin := begin + len(piece)), piece
            mapped.madvise(mmap.MADV_DONTNEED)  # pages that were read count as the process's memory until then


def _path(schema: pa.Schema, url: str, column: str) -> list[str]:
    """Return the names that lead to a column, which may be a field of another."""
    names, kind = [column] if column in schema.names else column.split("."), pa.struct(list(schema))
    for name in names:
        if not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
            raise no_column(url, column, schema.names)
        kind = kind.field(name).type
    return names


def _leaf(batch: pa.RecordBatch, names: list[str]) -> pa.Array:
    array = batch.column(names[0])
    for name in names[1:]:
        array = array.flatten()[array.type.get_field_index(name)]
    return array


def no_column(url: str, column: str, names: list[str]) -> NanodlmError:
    """Return the error of a file, or a row, that has other fields."""
    return NanodlmError(f"{url} has no column {column!r} but {names}: set --data.column")


ROWS: dict[str, Callable[..., Iterator[tuple[int, Any]]]] = {"text": _text, "jsonl": _jsonl, "json": _json, "csv": _csv}
COLUMNS: dict[str, Callable[..., Iterator[tuple[range, pa.Array]]]] = {"parquet": _parquet, "arrow": _arrow}
