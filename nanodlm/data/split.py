"""The stages that decide which documents are held out and make the tokenizer.

By default what is held out is decided by content alone. Units (documents, or rows of pre-tokenised data) are sorted by
a keyed hash; the front gives exactly `val_tokens` validation tokens, the rest of the unit where the budget ends is
dropped, and every unit with a larger key is for training. Equal documents have equal keys, so duplicates stay on one
side, and new data moves units only at the budget's edge. Or it is the end of the corpus, or files of their own.
"""

import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import tiktoken

from nanodlm.config import Config, DataConfig
from nanodlm.data.documents import VALIDATION, Documents, corpus, parts, read
from nanodlm.data.sources import source_files
from nanodlm.data.tokenizer import characters, gpt2, load, plain_bytes, save, tokenise_all, train_bpe
from nanodlm.errors import Emit, NanodlmError, SourceGone
from nanodlm.store import Artifact, Attempt

BPE_BYTES = 100_000_000  # of the documents that a tokenizer is trained on
VAL_TOKENS = 1_000_000
SMALL = 2_000_000  # tokens of a corpus too small for that, as far as sizes tell
TOKEN_BYTES = 5  # that a token of text stands for at most, as a rule
Place = list[int]  # a part, and how many of its values come before


def check_size(data: DataConfig) -> None:
    """Refuse more validation tokens than local files can give: each has at least one byte.

    Of compressed files, and of those elsewhere, no more is known before they are read. Files that are gone may have
    been downloaded before, as looking that up tells.
    """
    try:
        files = [] if data.revision else source_files(data)
    except SourceGone:
        return
    plain = (".txt", ".md", ".json", ".jsonl", ".csv")
    if data.val_tokens and files and all(url.startswith("file://") and url.endswith(plain) for url in files):
        size = sum(os.path.getsize(url.removeprefix("file://")) for url in files)
        one = len(files) == 1 and files[0].endswith(plain[:2]) and data.sample_by == "document"
        if (one and data.split != "last") or size + len(files) <= data.val_tokens:  # a mark has no bytes
            raise _too_small(data, f"{size:,} bytes", one=one)


class Unit(NamedTuple):
    """A document, or a run of rows that were cut from a stream: its key and its values."""

    key: bytes
    values: np.ndarray


@dataclass(frozen=True)
class Zone:
    """Documents that may be held out: the front by `hash`, the `last` of the corpus, or those of `files`."""

    kind: Literal["hash", "last", "files"]
    documents: Documents
    cut: Any  # the largest key among them, or the place where they begin; "" comes before all keys
    whole: bool = False  # whether nothing is left to train on

    @property
    def size(self) -> int:
        """Bytes of text, or token ids."""
        return len(self.documents.flat)


def front(batches: Iterable[Documents], seed: int, size: float) -> list[Unit]:
    """Return the units with the smallest keys, in their order: as few as have `size` values together, or all.

    One pass keeps little more than these, so memory does not grow with the corpus.
    """
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
        documents = Documents(np.concatenate([unit.values for unit in units]), np.cumsum([0, *sizes]))
        return Zone("hash", documents, units[-1].key.hex(), sum(sizes) == sum(download.metrics["part_sizes"]))
    place = place_at(download, sum(download.metrics["part_sizes"]) - size)
    after = Documents.join([back for _, back in at_place(download, place)])
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


def at_place(download: Artifact, place: Place) -> Iterator[tuple[Documents, Documents]]:
    """Yield what of a corpus's documents lies before a place, and what from there on."""
    folder = download.local()
    for number, name in enumerate(parts(download)):
        yield from halves(read(folder / name), number, place)


def halves(batches: Iterable[Documents], part: int, place: Place) -> Iterator[tuple[Documents, Documents]]:
    """Yield what of the documents of a part lies before a place, and what from there on."""
    seen = 0
    for batch in batches:
        size = len(batch.flat)
        yield batch.halves(place[1] - seen if part == place[0] else size if part < place[0] else 0)
        seen += size


def build_tokenizer(config: Config, inputs: dict[str, Artifact], attempt: Attempt, emit: Emit) -> dict[str, Any]:
    """Make the encoding; a trained one sees only documents that the split cannot hold out.

    How many those are depends on the encoding. So a zone is set aside, the encoding is trained on what follows it in
    the order of keys, `BPE_BYTES` at most, and the zone counted with it; when it has too few tokens, it grows and all
    starts over.
    """
    data, counts = config.data, {}
    if data.tokenizer == "chars":
        encoding = characters(corpus(inputs["download"]))
    elif data.tokenizer == "bpe":
        encoding, counts = _train_bpe(data, inputs["download"], emit)
    else:
        encoding = gpt2() if data.tokenizer == "gpt2" else plain_bytes()
    save(encoding, attempt.path)
    return {"n_vocab": encoding.n_vocab, **counts}


def _train_bpe(data: DataConfig, download: Artifact, emit: Emit) -> tuple[tiktoken.Encoding, dict[str, Any]]:
    kind, tokens, size = wanted(data, download)
    while True:
        aside = zone(kind, data, download, size)
        if aside.whole:
            size, documents = download.metrics["bytes"], download.metrics["documents"]
            raise _too_small(data, f"{size:,} bytes in {documents:,} documents", one=documents == 1)
        if kind == "hash":
            sample = front(corpus(download), data.split_seed, aside.size + BPE_BYTES)[len(aside.documents) :]
        elif kind == "last":
            sample = front((before for before, _ in at_place(download, aside.cut)), data.split_seed, BPE_BYTES)
        else:
            sample = front(corpus(download), data.split_seed, BPE_BYTES)
        seen = sum(len(unit.values) for unit in sample)
        emit("message", text=f"training BPE on {seen / 1e6:.3g} MB; {aside.size / 1e6:.3g} MB may be held out")
        encoding = train_bpe((unit.values.tobytes().decode() for unit in sample), data.vocab_size)
        found = len(_tokens(encoding, aside, tokens).flat)
        if tokens is None or found >= tokens:
            zoned = {"zone": aside.cut, "zone_bytes": aside.size, "zone_tokens": found}
            return encoding, {"trained_on_bytes": seen, "trained_on_documents": len(sample), **zoned}
        size = int(aside.size * 1.02 * tokens / found) + 1


def _tokens(encoding: tiktoken.Encoding, held: Zone, enough: int | None) -> Documents:
    """Return the token ids of a zone's documents: of the first that have enough of them, or of all."""
    found, total = [], 0
    for tokens in tokenise_all(encoding, held.documents.pieces(100_000)):
        found.append(tokens)
        total += len(tokens.flat)
        if held.kind == "hash" and enough and total >= enough:
            break
    return Documents.join(found)


def build_split(config: Config, inputs: dict[str, Artifact], attempt: Attempt, emit: Emit) -> dict[str, Any]:
    """Choose what is held out, and write its tokens (`validation.npy`) and the cut (`split.json`)."""
    data, download = config.data, inputs["download"]
    encoding = load(inputs["tokenizer"].local())
    kind, tokens, size = wanted(data, download)
    while True:
        held = zone(kind, data, download, size)
        found = _tokens(encoding, held, tokens)
        if tokens is None or len(found.flat) >= tokens:
            break
        if held.whole:
            raise _too_few(data, found)
        size = int(held.size * 1.02 * tokens / max(1, len(found.flat))) + 1
    cut, documents, validation = held.cut, len(found), found.flat
    if kind == "hash" and tokens:
        documents = int(np.searchsorted(found.offsets, tokens))
        if held.whole and documents == len(found):
            raise _too_few(data, found)
        cut = held.documents.keys(data.split_seed)[documents - 1].hex()
        validation = found.flat[:tokens]
    elif kind == "last" and tokens:
        first = len(validation) - tokens
        passed = first if data.pretokenized else len(_text(encoding, validation[:first]))
        cut = place_at(download, sum(download.metrics["part_sizes"]) - held.size + passed)
        documents, validation = documents - int(np.searchsorted(found.offsets, first, "right")) + 1, validation[first:]
    if data.split is None and kind == "last":
        tenth = f"the last tenth ({held.size / 1e6:.2g} MB) of a small corpus"
        emit("message", text=f"holding out {tenth}; --data.val_tokens N takes N tokens of documents chosen by hash")
    clear = inputs["tokenizer"].metrics.get("zone", cut)
    assert cut <= clear if kind == "hash" else cut >= clear, "the tokenizer was trained on what is held out"
    shared: dict[str, Any] = {}
    if kind == "hash" and "row_size" in download.metrics:
        shared = {"unit_rows": unit_rows(data, download), "val_shared_share": _shared(encoding, found, documents)}
        cut_up = (
            f"{shared['val_shared_share']:.1%} of what is held out belongs to documents that go on in training rows"
        )
        emit("message", text=f"{told}, as end-of-text marks tell: rows of one length were cut from a stream")
    np.save(attempt.path / "validation.npy", validation)
    (attempt.path / "split.json").write_text(json.dumps({"kind": kind, "cut": cut, "seed": data.split_seed}, indent=1))
    text = _text(encoding, validation)
    held_out = {"val_tokens": len(validation), "val_documents": documents, "val_bytes": len(text)}
    held_out["val_characters"] = int(((np.frombuffer(text, np.uint8) & 0xC0) != 0x80).sum())
    held_out["val_dropped_tokens"] = int(found.offsets[documents]) - len(validation) if kind == "hash" else 0
    return {"split": kind, **held_out, **shared, "documents": download.metrics["documents"], "cut": cut}


def _shared(encoding: tiktoken.Encoding, found: Documents, units: int) -> float:
    """Return the share of tokens in documents that no end-of-text mark ends on both sides of them within their unit."""
    shared = 0
    for tokens in itertools.islice(found, units):
        marks = np.flatnonzero(np.asarray(tokens) == encoding.eot_token)
        shared += len(tokens) - (int(marks[-1] - marks[0]) if len(marks) else 0)
    return shared / int(found.offsets[units])


def _text(encoding: tiktoken.Encoding, tokens: np.ndarray) -> bytes:
    return encoding.decode_bytes(tokens[tokens != encoding.eot_token].tolist())


def _too_few(data: DataConfig, tokens: Documents) -> NanodlmError:
    has, most = f"{len(tokens.flat):,} tokens in {len(tokens):,} documents", int(tokens.offsets[-2])
    return _too_small(data, has, one=len(tokens) == 1, most=most)


def _too_small(data: DataConfig, found: str, *, one: bool, most: int = 0) -> NanodlmError:
    """Say why a corpus, which may be one document, cannot be split so, and what helps: `most` tokens at most."""
    cut_up = "" if data.pretokenized else ", or cut .txt files up with --data.sample_by paragraph"
    if one and data.split != "last":
        what = "the corpus is one document, which cannot be split by hash"
        return NanodlmError(f"{what}: leave out --data.val_tokens, and its last tenth is held out{cut_up}")
    asked = f"{data.val_tokens or VAL_TOKENS:,} validation tokens and leave some to train on"
    lower = "lower --data.val_tokens" + (f" to at most {most:,}" if most else "")
    remedy = f"{lower}{' or leave it out' if data.val_tokens else ''}, add text{cut_up}"
    return NanodlmError(f"the corpus is smaller than the validation split: {found} cannot give {asked}; {remedy}")
