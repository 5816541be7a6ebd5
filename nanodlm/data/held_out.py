"""What may be held out of a corpus, and how it is found."""

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from nanodlm.config import DataConfig
from nanodlm.data.documents import Documents
from nanodlm.data.parts import VALIDATION, corpus, parts, read
from nanodlm.data.sources import PLAIN, READERS, format_of, source_files
from nanodlm.errors import NanodlmError, SourceGone, counted
from nanodlm.store import Artifact

VAL_TOKENS = 1_000_000
SMALL = 2_000_000  # tokens of a corpus too small for that, as far as sizes tell
TOKEN_BYTES = 6  # that a token of text stands for at most, as a rule
Place = list[int]  # a part, and how many of its values come before


def check_size(data: DataConfig) -> None:
    """Refuse more validation tokens than local files that are not packed can give: each has at least one byte."""
    try:
        files = [] if data.revision else source_files(data)
    except SourceGone:  # they may have been downloaded before, as looking that up tells
        return
    if data.val_tokens and files and all(url.startswith("file://") and format_of(url) in PLAIN for url in files):
        size = sum(os.path.getsize(url.removeprefix("file://")) for url in files)
        one = len(files) == 1 and READERS[format_of(files[0])[0]] == "text" and data.sample_by == "document"
        if (one and data.split != "last") or size + len(files) <= data.val_tokens:  # a mark has no bytes
            raise too_small(data, f"{size:,} bytes", one=one)


def check_rows(data: DataConfig, rows: int, tokens: int, length: int) -> None:
    """Refuse validation tokens that are one row: nobody should learn after the training what that lacks."""
    if rows < 2:
        few = f"{tokens:,} validation tokens are one row of seq_len ({length}), which has no standard error"
        remedy = "raise --data.val_tokens" if data.val_tokens else "add text"
        raise NanodlmError(f"{few}; {remedy}, or lower --model.seq_len")


class Unit(NamedTuple):
    """A document, or a run of rows that were cut from a stream: its key and its values."""

    key: bytes
    values: np.ndarray


@dataclass(frozen=True)
class Zone:
    """Documents that may be held out: the front by `hash`, the `last` of the corpus, or those of `files`."""

    kind: Literal["hash", "last", "files"]
    documents: Documents  # with the hashes that are their keys, of `hash`
    cut: Any  # the largest key among them, or the place where they begin; "" comes before all keys
    whole: bool = False  # whether nothing is left to train on

    @property
    def size(self) -> int:
        """Bytes of text, or token ids."""
        return len(self.documents.flat)


def front(batches: Iterable[Documents], seed: int, size: float) -> list[Unit]:
    """Return the units with the smallest keys, in order, as few as have `size` values together; little more is held."""
    kept: list[Unit] = []
    held, last = 0, b"\xff" * 16

    def prune() -> None:
        nonlocal kept, held, last
        kept.sort(key=lambda unit: unit.key)
        ends = np.cumsum([len(unit.values) for unit in kept])
        kept = kept[: int(np.searchsorted(ends, size)) + 1]
        held = sum(len(unit.values) for unit in kept)
        last = kept[-1].key if held >= size else last

    for batch in batches:
        for key, values in zip(batch.keys(seed), batch, strict=True):
            if key <= last:
                kept.append(Unit(key, np.array(values)))
                held += len(values)
        if held > 2 * size:
            prune()
    prune()
    return kept


def wanted(data: DataConfig, download: Artifact) -> tuple[Literal["hash", "last", "files"], int | None, int]:
    """Return which kind of documents is held out, how many tokens (None is all), and what size they may have."""
    total, documents = sum(download.metrics["part_sizes"]), download.metrics["documents"]
    each = 1 if data.pretokenized else TOKEN_BYTES
    if data.validation:
        return "files", None, 0
    few = total < SMALL * (1 if data.pretokenized else 4) or documents == 1
    last = data.split == "last" or (data.split is None and data.val_tokens is None and few)
    if last and data.val_tokens is None:
        return "last", None, total - math.floor(total * (1 - (data.val_share or 0.1)) + 1e-6)
    tokens = data.val_tokens or VAL_TOKENS
    return "last" if last else "hash", tokens, min(tokens * each, max(tokens, total // 2))


def unit_rows(data: DataConfig, download: Artifact) -> int:
    """Return how many rows that follow each other are held out together: one, unless they were cut from a stream.

    Of documents that lie in several rows, only those at the edges of such a run are also trained on. A million tokens
    are sixteen runs of 61 rows of 1,024.
    """
    size = download.metrics.get("row_size")
    return max(1, (data.val_tokens or VAL_TOKENS) // 16 // size) if size else 1


def in_units(batches: Iterable[Documents], rows: int) -> Iterable[Documents]:
    """Yield runs of so many rows as documents."""
    return batches if rows == 1 else (batch.joined(rows) for batch in batches)


def zone(kind: str, data: DataConfig, download: Artifact, size: int) -> Zone:
    """Return documents of a kind that have at least this size together, or all there are."""
    if kind == "files":
        return Zone("files", Documents.join(list(read(download.file(VALIDATION)))), "")
    if kind == "hash":
        units = front(in_units(corpus(download), unit_rows(data, download)), data.split_seed, size)
        sizes = [len(unit.values) for unit in units]
        keys = np.frombuffer(b"".join(unit.key for unit in units), np.uint8).reshape(-1, 16)
        documents = Documents(np.concatenate([unit.values for unit in units]), np.cumsum([0, *sizes]), keys)
        return Zone("hash", documents, units[-1].key.hex(), sum(sizes) == sum(download.metrics["part_sizes"]))
    place = place_at(download, sum(download.metrics["part_sizes"]) - size)
    after = Documents.join([back for _, back, _ in at_place(download, place)])
    return Zone("last", after, place, place == [0, 0])


def place_at(download: Artifact, before: int) -> Place:
    """Return the place that so many values of a corpus come before, or as many as end with a whole character."""
    part, before = 0, max(0, before)
    sizes = download.metrics["part_sizes"]
    while before >= sizes[part] and part + 1 < len(sizes):
        part, before = part + 1, before - sizes[part]
    seen = 0
    for batch in read(download.file(parts(download)[part])):
        values, at = batch.flat, before - seen
        if values.dtype == np.uint8 and 0 <= at < len(values):
            starts = np.flatnonzero((values[max(0, at - 3) : at + 1] & 0xC0) != 0x80)  # bytes that begin a character
            return [part, before - (min(at, 3) - int(starts[-1]))]
        seen += len(values)
    return [part, before]


def at_place(download: Artifact, place: Place) -> Iterator[tuple[Documents, Documents, bool]]:
    """Yield what `halves` does, of all parts."""
    folder = download.local()
    for number, name in enumerate(parts(download)):
        yield from halves(read(folder / name), number, place)


def halves(batches: Iterable[Documents], part: int, place: Place) -> Iterator[tuple[Documents, Documents, bool]]:
    """Yield what of the documents of a part lies before a place, what from there on, and if that cuts a document."""
    seen = 0
    for batch in batches:
        size = len(batch.flat)
        before, after = batch.halves(place[1] - seen if part == place[0] else size if part < place[0] else 0)
        yield before, after, len(before) + len(after) > len(batch)
        seen += size


def too_few(data: DataConfig, tokens: Documents) -> NanodlmError:
    """Return the error of a corpus whose tokens, all of them, are too few."""
    has, most = f"{counted(len(tokens.flat), 'tokens')} in {counted(len(tokens), 'documents')}", int(tokens.offsets[-2])
    return too_small(data, has, one=len(tokens) == 1, most=most)


def too_small(data: DataConfig, found: str, *, one: bool, most: int = 0) -> NanodlmError:
    """Say why a corpus, which may be one document, cannot be split so, and what helps: `most` tokens at most."""
    cut_up = "" if data.pretokenized else ", or cut .txt files up with --data.sample_by paragraph"
    if one and data.split != "last":
        what = "the corpus is one document, which cannot be split by hash"
        return NanodlmError(f"{what}: leave out --data.val_tokens, and its last tenth is held out{cut_up}")
    asked = f"{data.val_tokens or VAL_TOKENS:,} validation tokens and leave some to train on"
    lower = "lower --data.val_tokens" + (f" to at most {most:,}" if most else "")
    remedy = f"{lower}{' or leave it out' if data.val_tokens else ''}, add text{cut_up}"
    return NanodlmError(f"the corpus is smaller than the validation split: {found} cannot give {asked}; {remedy}")
