"""The documents of files, whatever their format. Rows that are none are left out, and counted by the reason.

A reader of rows is a generator of (line, value): `read_documents` sees to what the values are. To add a format, write
one and name it in `ROWS`, and its suffix in `sources.READERS`.
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
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, BinaryIO, cast

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from nanodlm.config import DataConfig
from nanodlm.data.sources import READERS, file_system, format_of, opened, reason
from nanodlm.errors import NanodlmError

BATCH_BYTES = 2_000_000  # or what a part holds, if that is less
BATCH_ROWS = 4096
CHUNK = 1 << 20  # bytes that are asked of a file at once
SHOWN = 5  # bad rows that are named
HOPELESS = 1000  # bad rows after which a source that is half bad is read no further
EMPTY = "empty"
CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
TOKENS = pa.list_(pa.uint16())
BETWEEN = re.compile(r"[\s,]*")  # rows of a JSON array


@dataclass
class Bad:
    """Rows that were left out: how many for each reason, and where the first few are."""

    counts: dict[str, int] = field(default_factory=dict)
    first: list[str] = field(default_factory=list)  # without the empty ones
    rows: int = 0  # all that were read

    @property
    def total(self) -> int:
        """The number of rows that count against `data.max_bad`, as empty ones do not."""
        return sum(count for why, count in self.counts.items() if why != EMPTY)

    def add(self, why: str, where: str) -> None:
        """Count one row, and name it if it is among the first."""
        self.counts[why] = self.counts.get(why, 0) + 1
        if why != EMPTY and len(self.first) < SHOWN:
            self.first.append(f"{where}: {why}")

    def __str__(self) -> str:
        reasons = ", ".join(f"{count:,} {why}" for why, count in self.counts.items())
        return f"{reasons} of {self.rows:,} rows" + (f" ({'; '.join(self.first)})" if self.first else "")


@dataclass
class Fault:
    """What stands in place of a row's value that could not be had; `names` are the fields that the row has instead."""

    why: str
    names: list[str] | None = None


def read_documents(data: DataConfig, files: list[str], bad: Bad) -> Iterator[pa.Array]:
    """Read the files' documents as arrays of `large_string`, or of `list<uint16>`, of about two megabytes each.

    An array may be a slice. Rows that are no document are added to `bad`; when they are more than `data.max_bad` of
    all, or half of the first few thousand, the error says which.
    """
    pending: list[pa.Array] = []
    size, rows = 0, 0
    for url in files:
        try:
            for batch in _batches(url, data):
                documents = _documents(data, url, *batch, bad)
                pending.append(documents)
                size, rows = size + documents.nbytes, rows + len(documents)
                if rows and (size >= _most(data) or rows >= BATCH_ROWS):
                    yield pa.concat_arrays(pending)
                    pending, size, rows = [], 0, 0
                if bad.total > max(HOPELESS, bad.rows / 2):
                    _check(data, bad)
        except NanodlmError:
            raise
        except Exception as error:  # each format and file system has its own
            raise NanodlmError(f"cannot read {url} as {format_of(url)[0][1:]}: {reason(error)}") from error
    _check(data, bad)
    if rows:
        yield pa.concat_arrays(pending)


def _most(data: DataConfig) -> int:
    return int(min(BATCH_BYTES, data.part_mb * 1e6))


def _check(data: DataConfig, bad: Bad) -> None:
    if bad.total > data.max_bad * bad.rows:
        remedy = f"mend or leave out those, or raise --data.max_bad ({data.max_bad:g})"
        raise NanodlmError(f"too many rows are no documents: {bad}; {remedy}")


def _batches(url: str, data: DataConfig) -> Iterator[tuple[Sequence[int], Any]]:
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
            if size >= _most(data) or len(values) == BATCH_ROWS:
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
        return
    begin, paragraph = 1, []
    for number, line in enumerate(file, 1):
        if data.sample_by == "line":
            yield number, line.removesuffix(b"\n")
        elif line in (b"\n", b"\r\n"):
            if paragraph:
                yield begin, b"".join(paragraph).removesuffix(b"\n")
            begin, paragraph = number + 1, []
        else:
            paragraph.append(line)
    if paragraph:
        yield begin, b"".join(paragraph).removesuffix(b"\n")


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
    lines = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="\n")
    rows = csv.reader(lines, strict=True)
    names = next(rows, [])
    if data.column not in names:
        raise _no_column(url, data.column, names)
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
            size = sum(
                x.total_uncompressed_size for x in leaves if f"{x.path_in_schema}.".startswith(f"{data.column}.")
            )
            count = max(1, min(2 * _most(data) * about.num_rows // max(size, 1), BATCH_ROWS // 4))
            for batch in parquet.iter_batches(count, row_groups=[group], columns=[data.column], use_threads=False):
                yield range(begin, begin := begin + len(batch)), _leaf(batch, names)


def _arrow(file: Any, url: str, data: DataConfig) -> Iterator[tuple[range, pa.Array]]:
    """Read a column of an IPC file, or of a stream, as `datasets` saves; a part of a mapped file takes no memory."""
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # closed when nothing is left that lies in it
    opened = pa.ipc.open_file if mapped[:6] == b"ARROW1" else pa.ipc.open_stream
    reader = opened(pa.py_buffer(mapped))
    names, begin = _path(reader.schema, url, data.column), 1
    batches = map(reader.get_batch, range(reader.num_record_batches)) if opened is pa.ipc.open_file else reader
    for array in (_leaf(batch, names) for batch in batches):
        count = max(1, min(_most(data) * len(array) // max(array.nbytes, 1), BATCH_ROWS))
        for start in range(0, len(array), count):
            piece = array.slice(start, count)
            yield range(begin, begin := begin + len(piece)), piece
            mapped.madvise(mmap.MADV_DONTNEED)  # pages that were read count as the process's memory until then


def _path(schema: pa.Schema, url: str, column: str) -> list[str]:
    """Return the names that lead to a column, which may be a field of another."""
    names, kind = [column] if column in schema.names else column.split("."), pa.struct(list(schema))
    for name in names:
        if not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
            raise _no_column(url, column, schema.names)
        kind = kind.field(name).type
    return names


def _leaf(batch: pa.RecordBatch, names: list[str]) -> pa.Array:
    array = batch.column(names[0])
    return pc.struct_field(array, names[1:]) if names[1:] else array


def _no_column(url: str, column: str, names: list[str]) -> NanodlmError:
    return NanodlmError(f"{url} has no column {column!r} but {names}: set --data.column")


ROWS: dict[str, Callable[..., Iterator[tuple[int, Any]]]] = {"text": _text, "jsonl": _jsonl, "json": _json, "csv": _csv}
COLUMNS: dict[str, Callable[..., Iterator[tuple[range, pa.Array]]]] = {"parquet": _parquet, "arrow": _arrow}


def _documents(data: DataConfig, url: str, numbers: Sequence[int], rows: Any, bad: Bad) -> pa.Array:
    """Make documents of rows, and add those that are none to `bad`."""
    if not bad.rows and isinstance(rows, list) and all(isinstance(v, Fault) and v.names is not None for v in rows):
        raise _no_column(url, data.column, rows[0].names)
    array, faults = (_tokens if data.pretokenized else _texts)(rows, url, data.column)
    lengths = pc.list_value_length(array) if data.pretokenized else pc.binary_length(array)
    keep = pc.fill_null(lengths, 0).to_numpy(zero_copy_only=False) > 0
    keep[[*faults]] = False
    bad.rows += len(keep)
    if keep.all():
        return array
    nulls = array.is_null().to_numpy(zero_copy_only=False)
    for i in np.flatnonzero(~keep).tolist():
        bad.add(faults.get(i) or ("null" if nulls[i] else EMPTY), f"{url}:{numbers[i]}")
    return array.filter(pa.array(keep))


def _texts(rows: Any, url: str, column: str) -> tuple[pa.Array, dict[int, str]]:
    """Make texts of rows, and say of each that is none why; when some is none, rows are looked at one by one."""
    kind = getattr(rows, "type", pa.string())
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_null(kind) or str(kind).removeprefix("large_").startswith(("string", "binary"))):
        remedy = "set --data.column" + (", or --data.pretokenized True" if "list" in str(kind) else "")
        raise NanodlmError(f"cannot read {url}: {column!r} holds {kind}, not texts; {remedy}")
    try:
        array = rows.cast(pa.large_string()) if isinstance(rows, pa.Array) else pa.array(rows, pa.large_string())
        array.validate(full=True)  # only this looks for invalid UTF-8
        return array, {}
    except (pa.ArrowException, UnicodeError):
        values = rows.cast(pa.large_binary()).to_pylist() if isinstance(rows, pa.Array) else rows
    faults = {i: why for i, value in enumerate(values) if (why := _no_text(value))}
    return pa.array([None if i in faults else value for i, value in enumerate(values)], pa.large_string()), faults


def _no_text(value: Any) -> str:
    """Say why a value is no text; nothing if it is one, or null."""
    if isinstance(value, Fault):
        return value.why
    if not isinstance(value, str | bytes | None):
        return f"{type(value).__name__} instead of a text"
    try:
        _ = value.encode() if isinstance(value, str) else (value or b"").decode()
    except UnicodeError:
        return "not UTF-8"  # a lone surrogate in JSON included
    return ""


def _tokens(rows: Any, url: str, column: str) -> tuple[pa.Array, dict[int, str]]:
    """Make lists of token ids of rows, and say of each that is none why."""
    faults: dict[int, str] = {}
    if isinstance(rows, list):
        faults = {i: why for i, value in enumerate(rows) if (why := _no_ids(value))}
        rows = pa.array([None if i in faults else value for i, value in enumerate(rows)])
    kind = getattr(rows.type, "value_type", rows.type)
    if not (pa.types.is_integer(kind) or pa.types.is_null(kind)):
        remedy = "set --data.column, or leave out --data.pretokenized"
        raise NanodlmError(f"cannot read {url}: {column!r} holds {rows.type}, not lists of token ids; {remedy}")
    try:
        array = rows.cast(TOKENS)
    except pa.ArrowInvalid as error:
        remedy = "check --data.tokenizer and --data.column"
        raise NanodlmError(f"a row of {url} holds a token id that is none: {error}; {remedy}") from error
    ids = array.flatten()
    if ids.null_count:
        gaps = pc.list_parent_indices(array).filter(ids.is_null()).unique()
        faults |= dict.fromkeys(gaps.to_pylist(), "a gap (null) between ids")
    return array, faults


def _no_ids(value: Any) -> str:
    """Say why a parsed value is no list of token ids; nothing if it is one, or null."""
    if isinstance(value, Fault):
        return value.why
    if value is None or (isinstance(value, list) and all(type(i) in (int, NoneType) for i in value)):
        return ""
    return "no list of token ids"
