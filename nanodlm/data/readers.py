"""The documents of files, whatever their format. Rows that are none are left out, and counted by the reason."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nanodlm.config import DataConfig
from nanodlm.data.formats import Fault, batches, no_column
from nanodlm.data.sources import format_of, reason
from nanodlm.data.tokenizer import SIZES
from nanodlm.errors import NanodlmError

SHOWN = 5  # bad rows that are named
HOPELESS = 1000  # bad rows after which a source that is half bad is read no further
EMPTY = "empty"
TOKENS = pa.list_(pa.uint16())


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


def read_documents(data: DataConfig, files: Iterable[str], bad: Bad) -> Iterator[pa.Array]:
    """Read the files' documents as arrays of `large_string`, or of `list<uint16>`, a few megabytes at a time.

    An array may be a slice. Rows that are no document are added to `bad`; when they are half of the first few thousand,
    the error says which. What is read of all is for `check_share` to judge, at the end.
    """
    for url in files:
        try:
            for batch in batches(url, data):
                documents = _documents(data, url, *batch, bad)
                if len(documents):
                    yield documents
                if bad.total > max(HOPELESS, bad.rows / 2):
                    check_share(data, bad)
        except NanodlmError:
            raise
        except Exception as error:  # each format and file system has its own
            raise NanodlmError(f"cannot read {url} as {format_of(url)[0][1:]}: {reason(error)}") from error


def check_share(data: DataConfig, bad: Bad) -> None:
    """Refuse rows of which more than `data.max_bad` are no documents, and say which."""
    if bad.total > data.max_bad * bad.rows:
        remedy = f"mend or leave out those, or raise --data.max_bad ({data.max_bad:g})"
        if sum(bad.counts.values()) == bad.rows:
            remedy = "check --data.column, and that files are UTF-8 and of the format that their suffix names"
        raise NanodlmError(f"too many rows are no documents: {bad}; {remedy}")


def _documents(data: DataConfig, url: str, numbers: Sequence[int], rows: Any, bad: Bad) -> pa.Array:
    """Make documents of rows, and add those that are none to `bad`."""
    if not bad.rows and isinstance(rows, list) and all(isinstance(v, Fault) and v.names is not None for v in rows):
        raise no_column(url, data.column, rows[0].names)
    if isinstance(rows, pa.Array) or not bad.rows:
        _check_kind(data, url, rows)
    array, faults = _tokens(rows, url, numbers, data) if data.pretokenized else _texts(rows)
    lengths = pc.call_function("list_value_length" if data.pretokenized else "binary_length", [array])
    keep = pc.fill_null(lengths, 0).to_numpy(zero_copy_only=False) > 0
    keep[[*faults]] = False
    bad.rows += len(keep)
    if keep.all():
        return array
    nulls = array.is_null().to_numpy(zero_copy_only=False)
    for i in np.flatnonzero(~keep).tolist():
        bad.add(faults.get(i) or ("null" if nulls[i] else EMPTY), f"{url}:{numbers[i]}")
    return array.filter(pa.array(keep))


def _check_kind(data: DataConfig, url: str, rows: Any) -> None:
    """Refuse a column that holds nothing of what is wanted, or values that are all of another kind; say what helps."""
    kind = getattr(rows, "type", pa.null())
    with contextlib.suppress(pa.ArrowException):
        if isinstance(rows, list) and len({type(value) for value in rows} - {NoneType}) == 1:
            kind = pa.infer_type(rows)
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    lists = pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list  # of views, pyarrow's cast is wrong
    holds = kind.value_type if any(is_a(kind) for is_a in lists) else pa.string()
    is_text = str(kind).removeprefix("large_").startswith(("string", "binary"))
    is_ids = pa.types.is_integer(holds) or pa.types.is_null(holds)
    if not (pa.types.is_null(kind) or (is_ids if data.pretokenized else is_text)):
        remedy = ", or leave out --data.pretokenized" * is_text + ", or --data.pretokenized True" * is_ids
        if fields := list(kind) if pa.types.is_struct(kind) else []:
            remedy = f" to a field of it, such as {data.column}.{fields[0].name}"
        what = f"{kind}, not {'lists of token ids' if data.pretokenized else 'texts'}"
        raise NanodlmError(f"cannot read {url}: {data.column!r} holds {what}; set --data.column{remedy}")


def _texts(rows: Any) -> tuple[pa.Array, dict[int, str]]:
    """Make texts of rows, and say of each that is none why; when some is none, rows are looked at one by one."""
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


def _tokens(rows: Any, url: str, numbers: Sequence[int], data: DataConfig) -> tuple[pa.Array, dict[int, str]]:
    """Make lists of token ids of rows, and say of each that is none why."""
    faults: dict[int, str] = {}
    if isinstance(rows, list):
        faults = {i: why for i, value in enumerate(rows) if (why := _no_ids(value))}
        rows = pa.array([None if i in faults else value for i, value in enumerate(rows)])
    size, array = SIZES.get(data.tokenizer, 2**16), None
    with contextlib.suppress(pa.ArrowInvalid):
        array = rows.cast(TOKENS)
    if array is None or (pc.call_function("max", [array.flatten()]).as_py() or 0) >= size:
        ids = ((number, i) for number, row in zip(numbers, rows.to_pylist(), strict=True) for i in row or () if i)
        number, wrong = next((number, i) for number, i in ids if not 0 <= i < size)
        has = f"holds token id {wrong}, but {data.tokenizer} has ids 0 to {size - 1}"
        raise NanodlmError(f"{url}:{number} {has}: check --data.tokenizer and --data.column")
    if array.flatten().null_count:
        there, present = np.flatnonzero(array.is_valid()), array.drop_null()
        gaps = pc.call_function("list_parent_indices", [present]).filter(present.flatten().is_null()).unique()
        faults |= dict.fromkeys(there[gaps].tolist(), "a gap (null) between ids")
    return array, faults


def _no_ids(value: Any) -> str:
    """Say why a parsed value is no list of token ids; nothing if it is one, or null."""
    if isinstance(value, Fault):
        return value.why
    if value is None or (isinstance(value, list) and all(type(i) in (int, NoneType) for i in value)):
        return ""
    return "no list of token ids"
