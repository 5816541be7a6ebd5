"""The stages that decide which documents are held out and make the tokenizer.

By default what is held out is decided by content alone. Units (documents, or rows of pre-tokenised data) are sorted by
a keyed hash; the front gives exactly `val_tokens` validation tokens, the rest of the unit where the budget ends is
dropped, and every unit with a larger key is for training. Equal documents have equal keys, so duplicates stay on one
side, and new data moves units only at the budget's edge. Or it is the end of the corpus, or files of their own.
"""

import itertools
import json
from typing import Any

import numpy as np
import tiktoken

from nanodlm.config import Config, DataConfig
from nanodlm.data.documents import Documents
from nanodlm.data.held_out import Zone, at_place, front, place_at, too_few, too_small, unit_rows, wanted, zone
from nanodlm.data.parts import VALIDATION, corpus, read
from nanodlm.data.tokenizer import characters, gpt2, load, plain_bytes, save, token_sizes, tokenise_all, train_bpe
from nanodlm.errors import Emit, counted
from nanodlm.store import Artifact, Attempt

BPE_BYTES = 100_000_000  # of the documents that a tokenizer is trained on


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
            raise too_small(data, f"{size:,} bytes in {counted(documents, 'documents')}", one=documents == 1)
        if kind == "hash":
            sample = front(corpus(download), data.split_seed, aside.size + BPE_BYTES)[len(aside.documents) :]
        elif kind == "last":
            sample = front((before for before, *_ in at_place(download, aside.cut)), data.split_seed, BPE_BYTES)
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
    sizes = token_sizes(encoding)
    kind, tokens, size = wanted(data, download)
    while True:
        held = zone(kind, data, download, size)
        found = _tokens(encoding, held, tokens)
        if tokens is None or len(found.flat) >= tokens:
            break
        if held.whole:
            raise too_few(data, found)
        size = int(held.size * 1.02 * tokens / max(1, len(found.flat))) + 1
    cut, documents, validation = held.cut, len(found), found.flat
    if kind == "hash" and tokens:
        documents = int(np.searchsorted(found.offsets, tokens))
        if held.whole and documents == len(found):
            raise too_few(data, found)
        cut = held.documents.hashes[documents - 1].tobytes().hex()
        validation = found.flat[:tokens]
    elif kind == "last" and tokens:
        first = len(validation) - tokens
        passed = first if data.pretokenized else int(sizes[validation[:first], 0].sum())
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
        share = f"{shared['val_shared_share']:.1%} of what is held out"
        emit("message", text=f"{share} belongs to documents that go on in training rows, as end-of-text marks tell")
    if kind == "files":
        shared = {"val_twins": (twins := _twins(download))}
        if twins:
            said = f"{counted(twins, 'documents')} of the source are in --data.validation but for white space and case"
            emit("message", text=f"{said}, and are trained on; --data.decontaminate 13 leaves such documents out")
    np.save(attempt.path / "validation.npy", validation)
    (attempt.path / "split.json").write_text(json.dumps({"kind": kind, "cut": cut, "seed": data.split_seed}, indent=1))
    held_out = {"val_tokens": len(validation), "val_documents": documents}
    held_out |= dict(zip(("val_bytes", "val_characters"), sizes[validation].sum(0).tolist(), strict=True))
    held_out["val_dropped_tokens"] = int(found.offsets[documents]) - len(validation) if kind == "hash" else 0
    return {"split": kind, **held_out, **shared, "documents": download.metrics["documents"], "cut": cut}


def _shared(encoding: tiktoken.Encoding, found: Documents, units: int) -> float:
    """Return the share of tokens in documents that no end-of-text mark ends on both sides of them within their unit."""
    shared = 0
    for tokens in itertools.islice(found, units):
        marks = np.flatnonzero(np.asarray(tokens) == encoding.eot_token)
        shared += len(tokens) - (int(marks[-1] - marks[0]) if len(marks) else 0)
    return shared / int(found.offsets[units])


def _twins(download: Artifact) -> int:
    """Count the documents of the source that have the hash of one of the validation set of its own."""
    held_out = {key for batch in read(download.file(VALIDATION)) for key in batch.keys(0)}
    return sum(key in held_out for batch in corpus(download) for key in batch.keys(0))
