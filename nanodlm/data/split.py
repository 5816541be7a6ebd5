"""The stages that decide which documents are held out and make the tokenizer.

What is held out is decided by content alone. Units (documents, or rows of pre-tokenised data) are sorted by a
keyed hash; the front gives exactly `val_tokens` validation tokens, the rest of the unit where the budget ends is
dropped, and every unit with a larger key is for training. Equal documents have equal keys, so duplicates stay on one
side, and new data moves units only at the budget's edge. Of a small corpus the last tenth is held out.
"""

import hashlib
import heapq
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from nanodlm.config import Config, DataConfig
from nanodlm.data import download
from nanodlm.data.rows import dtype_for
from nanodlm.data.sources import PLAIN, READERS, format_of, source_files
from nanodlm.data.tokenizer import gpt2, load, plain_bytes, save, token_bytes, tokenise, train_bpe
from nanodlm.errors import Emit, NanodlmError, SourceGone
from nanodlm.store import Artifact, Attempt

MAX_BPE_BYTES = 200_000_000
VAL_TOKENS = 1_000_000
PROBE_BYTES = 1_000_000
SMALL = 8_000_000  # bytes: about two million tokens of text, and two million ids of four bytes
Place = list[int]  # a part, a document of it, and how many characters (or ids) of that document come before


def tokens_by_hash(data: DataConfig, corpus: Artifact) -> int | None:
    """Return how many tokens are held out by hash; None, for the last tenth, if a corpus is small and no number set."""
    if data.val_tokens is None and (corpus.metrics["bytes"] < SMALL or corpus.metrics["documents"] == 1):
        return None
    return data.val_tokens or VAL_TOKENS


def check_size(data: DataConfig) -> None:
    """Refuse more validation tokens than local files can give: each has at least one byte.

    Of files that are compressed, parquet among them, and of those elsewhere no more is known before they are read.
    Files that are gone may have been downloaded before, as looking that up tells.
    """
    try:
        files = [] if data.revision else source_files(data)
    except SourceGone:
        return
    known = all(url.startswith("file://") and format_of(url) in PLAIN for url in files)
    if data.val_tokens is None or not files or not known:
        return
    size = sum(os.path.getsize(url.removeprefix("file://")) for url in files)
    one = len(files) == 1 and READERS[format_of(files[0])[0]] == "text" and data.sample_by == "document"
    if one or size + len(files) <= data.val_tokens:  # an end-of-text mark is a token without bytes
        raise _too_small(data, f"{size:,} bytes", one=one)


def document_key(content: str | list[int], seed: int) -> str:
    """Return the key of a unit: 32 hex digits, uniform over contents, a function of content and seed only."""
    data = content.encode() if isinstance(content, str) else np.asarray(content, "<i4").tobytes()
    return hashlib.blake2b(data, key=seed.to_bytes(8, "little"), digest_size=16).hexdigest()


def _keyed_documents(folder: Path, seed: int) -> Iterator[tuple[str, Any]]:
    for part in sorted(folder.glob("part-*.parquet")):
        for document in download.documents(part):
            yield document_key(document, seed), document


def last_tenth(corpus: Artifact) -> Place:
    """Return where the last tenth of a corpus begins, by bytes of text (at the edge of a character) or by ids."""
    units = [[d.encode() if isinstance(d, str) else d for d in part] for part in download.by_part(corpus)]
    part, row, left = 0, 0, sum(len(document) for documents in units for document in documents) * 9 // 10
    while left >= len(units[part][row]):
        left -= len(units[part][row])
        part, row = (part, row + 1) if row + 1 < len(units[part]) else (part + 1, 0)
    before = units[part][row][:left]
    return [part, row, len(before.decode(errors="ignore") if isinstance(before, bytes) else before)]


def halves(documents: Iterable[Any], part: int, place: Place) -> Iterator[tuple[Any, Any]]:
    """Yield what of each document of a part lies before a place, and what from there on; one of them may be empty.

    >>> list(halves(["one", "two", "three"], 4, [4, 1, 2]))
    [('one', ''), ('tw', 'o'), ('', 'three')]
    """
    for row, document in enumerate(documents):
        here = [part, row]
        at = place[2] if here == place[:2] else len(document) if here < place[:2] else 0
        yield document[:at], document[at:]


def build_tokenizer(config: Config, inputs: dict[str, Artifact], attempt: Attempt, emit: Emit) -> dict[str, Any]:
    """Make the encoding; a trained one sees only documents that the split cannot hold out.

    How many those are depends on the encoding. So a zone at the front of their order is set aside, the encoding is
    trained on the rest, and the zone counted with it; when it has too few tokens, it grows and all starts over.
    """
    data, counts = config.data, {}
    if data.tokenizer != "bpe":
        encoding = gpt2() if data.tokenizer == "gpt2" else plain_bytes()
    elif (wanted := tokens_by_hash(data, inputs["download"])) is None:
        corpus = inputs["download"]
        emit("message", text="training BPE on all but the last tenth")
        place, every = last_tenth(corpus), enumerate(download.by_part(corpus))
        fronts = (front for part, documents in every for front, _ in halves(documents, part, place))
        encoding = train_bpe(_up_to(MAX_BPE_BYTES, fronts), data.vocab_size)
    else:
        folder = inputs["download"].local()
        order = sorted((key, len(text.encode())) for key, text in _keyed_documents(folder, data.split_seed))
        total, target = sum(size for _, size in order), float(wanted)  # a token has at least one byte; then by counting
        limit = MAX_BPE_BYTES if 2 * wanted <= total else PROBE_BYTES  # that there is not enough is seen before long
        while True:
            zone_end, zone_bytes = "", 0
            for key, size in order:
                if zone_bytes >= target:
                    break
                zone_end, zone_bytes = key, zone_bytes + size
            if zone_end == order[-1][0]:
                raise _too_small(data, f"{total:,} bytes in {len(order):,} documents", one=len(order) == 1)
            emit("message", text=f"training BPE on all but {zone_bytes / 1e6:.3g} MB that may be held out")
            after_zone = (text for key, text in _keyed_documents(folder, data.split_seed) if key > zone_end)
            encoding = train_bpe(_up_to(limit, after_zone), data.vocab_size)
            zone = (text for key, text in _keyed_documents(folder, data.split_seed) if key <= zone_end)
            tokens = sum(len(encoding.encode_ordinary(text)) + 1 for text in zone)
            if tokens < wanted:
                target = zone_bytes * 1.02 * wanted / tokens
            elif limit == MAX_BPE_BYTES:
                break
            else:
                target, limit = float(wanted), MAX_BPE_BYTES
        counts = {"zone_end": zone_end, "zone_bytes": zone_bytes, "zone_tokens": tokens}
    save(encoding, attempt.path)
    return {"n_vocab": encoding.n_vocab, **counts}


def _too_small(data: DataConfig, found: str, *, one: bool, most: int | None = None) -> NanodlmError:
    """Say why a corpus, which may be one document, cannot be split by hash, and what helps: `most` tokens at most."""
    cut_up = "" if data.pretokenized else ", or cut .txt files up with --data.sample_by paragraph"
    if one:
        what = "the corpus is one document, which cannot be split by hash"
        return NanodlmError(f"{what}: leave out --data.val_tokens, and its last tenth is held out{cut_up}")
    wanted = f"{data.val_tokens or VAL_TOKENS:,} validation tokens and leave some to train on"
    lower = "lower --data.val_tokens" + (f" to at most {most:,}" if most else "")
    remedy = f"{lower}{' or leave it out' if data.val_tokens else ''}, add text{cut_up}"
    return NanodlmError(f"the corpus is smaller than the validation split: {found} cannot give {wanted}; {remedy}")


def _up_to(limit: int, texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        if limit <= 0:
            return
        limit -= len(text)
        yield text


def build_split(config: Config, inputs: dict[str, Artifact], attempt: Attempt, emit: Emit) -> dict[str, Any]:
    """Choose what is held out, and write its tokens (`validation.npy`) and the cut (`split.json`)."""
    data, corpus = config.data, inputs["download"]
    encoding = load(inputs["tokenizer"].local())
    wanted = tokens_by_hash(data, corpus)
    zone_end = inputs["tokenizer"].metrics.get("zone_end")
    if wanted is None:
        assert zone_end is None, "the tokenizer was trained on what is held out"
        cut, every = last_tenth(corpus), enumerate(download.by_part(corpus))
        tenth = f"the last tenth ({corpus.metrics['bytes'] / 1e7:.2g} MB) of a small corpus"
        emit("message", text=f"holding out {tenth}; --data.val_tokens N takes N tokens of documents chosen by hash")
        backs = [back for part, documents in every for _, back in halves(documents, part, cut)]
        chosen = [tokenise(encoding, back) for back in backs if back]
    else:
        cut, chosen = _chosen_by_hash(data, corpus, encoding, wanted)
        assert zone_end is None or cut <= zone_end, "the tokenizer was trained on a held-out document"
    validation = np.concatenate(chosen)[:wanted]
    np.save(attempt.path / "validation.npy", validation.astype(dtype_for(encoding.n_vocab + 1)))
    described = {"cut": cut} if wanted is None else {"cut": cut, "seed": data.split_seed}
    (attempt.path / "split.json").write_text(json.dumps(described, indent=1))
    held_out = {"val_tokens": len(validation), "val_documents": len(chosen)}
    held_out["val_bytes"] = int(np.array(token_bytes(encoding))[validation].sum())
    held_out["val_dropped_tokens"] = sum(len(tokens) for tokens in chosen) - len(validation)
    split = "last" if wanted is None else "hash"
    return {"split": split, **held_out, "documents": corpus.metrics["documents"], "cut": cut}


def _chosen_by_hash(data: DataConfig, corpus: Artifact, encoding: tiktoken.Encoding, wanted: int) -> tuple[str, list]:
    """Return the key of the last unit that is held out, and the tokens of all that are, in the order of their keys.

    One pass keeps just as many units as the budget needs, so memory does not grow with the corpus.
    """
    chosen: list[tuple[int, int, Any]] = []  # a heap with the largest key on top; numbers keep duplicates in order
    total, units = 0, corpus.metrics["documents"]
    for number, (key, document) in enumerate(_keyed_documents(corpus.local(), data.split_seed)):
        if total >= wanted and int(key, 16) > -chosen[0][0]:
            continue
        tokens = tokenise(encoding, document)
        heapq.heappush(chosen, (-int(key, 16), number, tokens))
        total += len(tokens)
        while total - len(chosen[0][2]) >= wanted:
            total -= len(heapq.heappop(chosen)[2])
    if total < wanted or units <= len(chosen):
        most = total - len(chosen[0][2])
        raise _too_small(data, f"{total:,} tokens in {units:,} documents", one=units == 1, most=most)
    chosen.sort(key=lambda item: -item[0])
    return f"{-chosen[-1][0]:032x}", [tokens for *_, tokens in chosen]
