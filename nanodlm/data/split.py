"""The stages that decide which documents are held out and make the tokenizer.

What is held out is decided by content alone. Units (documents, or rows of pre-tokenised data) are sorted by a
keyed hash; the front gives exactly `val_tokens` validation tokens, the rest of the unit where the budget ends is
dropped, and every unit with a larger key is for training. Equal documents have equal keys, so duplicates stay on one
side, and new data moves units only at the budget's edge.
"""

import hashlib
import heapq
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nanodlm.config import Config
from nanodlm.data import download
from nanodlm.data.rows import dtype_for
from nanodlm.data.tokenizer import gpt2, load, plain_bytes, save, token_bytes, tokenise, train_bpe
from nanodlm.errors import NanodlmError
from nanodlm.store import Artifact, Attempt

Emit = Callable[..., None]
MAX_BPE_BYTES = 200_000_000


def document_key(content: str | list[int], seed: int) -> str:
    """Return the key of a unit: 32 hex digits, uniform over contents, a function of content and seed only.

    >>> document_key("a", 0) == document_key("a", 0) != document_key("a", 1)
    True
    """
    data = content.encode() if isinstance(content, str) else np.asarray(content, "<i4").tobytes()
    return hashlib.blake2b(data, key=seed.to_bytes(8, "little"), digest_size=16).hexdigest()


def _keyed_documents(folder: Path, seed: int) -> Iterator[tuple[str, Any]]:
    for part in sorted(folder.glob("part-*.parquet")):
        for document in download.documents(part):
            yield document_key(document, seed), document


def build_tokenizer(config: Config, inputs: dict[str, Artifact], attempt: Attempt, emit: Emit) -> dict[str, Any]:
    """Make the encoding; a trained one sees only documents that the split cannot hold out.

    How many those are depends on the encoding. So a zone at the front of their order is set aside, the encoding is
    trained on the rest, and the zone counted with it; when it has too few tokens, it grows and all starts over.

    Raises:
        NanodlmError: When the corpus is too small for the validation split.
    """
    data = config.data
    if data.tokenizer != "bpe":
        fixed = gpt2() if data.tokenizer == "gpt2" else plain_bytes()
        save(fixed, attempt.path)
        return {"n_vocab": fixed.n_vocab}
    folder = inputs["download"].local()
    order = sorted((key, len(text.encode())) for key, text in _keyed_documents(folder, data.split_seed))
    target = float(data.val_tokens)  # a token has at least one byte; corrected by counting
    while True:
        zone_end, zone_bytes = "", 0
        for key, size in order:
            if zone_bytes >= target:
                break
            zone_end, zone_bytes = key, zone_bytes + size
        if zone_end == order[-1][0]:
            raise _too_small(data.val_tokens, f"{sum(size for _, size in order) / 1e6:.2f} MB", len(order))
        emit("message", text=f"training BPE on all but {zone_bytes / 1e6:.3g} MB that may be held out")
        after_zone = (text for key, text in _keyed_documents(folder, data.split_seed) if key > zone_end)
        encoding = train_bpe(_up_to(MAX_BPE_BYTES, after_zone), data.vocab_size)
        zone = (text for key, text in _keyed_documents(folder, data.split_seed) if key <= zone_end)
        tokens = sum(len(encoding.encode_ordinary(text)) + 1 for text in zone)
        if tokens >= data.val_tokens:
            break
        target = zone_bytes * 1.02 * data.val_tokens / tokens
    save(encoding, attempt.path)
    return {"n_vocab": encoding.n_vocab, "zone_end": zone_end, "zone_bytes": zone_bytes, "zone_tokens": tokens}


def _too_small(val_tokens: int, size: str, units: int) -> NanodlmError:
    found = f"{size} in {units:,} documents cannot give {val_tokens:,} validation tokens and leave some to train on"
    remedy = "add text, lower --data.val_tokens, or cut long .txt files up with --data.sample_by paragraph"
    return NanodlmError(f"the corpus is smaller than the validation split: {found}; {remedy}")


def _up_to(limit: int, texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        if limit <= 0:
            return
        limit -= len(text)
        yield text


def build_split(config: Config, inputs: dict[str, Artifact], attempt: Attempt, emit: Emit) -> dict[str, Any]:
    """Choose the held-out units and write their tokens (`validation.npy`) and the cut (`split.json`).

    One pass keeps just as many units as the budget needs, so memory does not grow with the corpus.

    Raises:
        NanodlmError: When the corpus has too few tokens, or a row has ids that the tokenizer lacks.
    """
    data = config.data
    encoding = load(inputs["tokenizer"].local())
    chosen: list[tuple[int, int, Any]] = []  # a heap with the largest key on top; counts keep duplicates in order
    total = units = 0
    for key, document in _keyed_documents(inputs["download"].local(), data.split_seed):
        units += 1
        if total >= data.val_tokens and int(key, 16) > -chosen[0][0]:
            continue
        tokens = tokenise(encoding, document)
        heapq.heappush(chosen, (-int(key, 16), units, tokens))
        total += len(tokens)
        while total - len(chosen[0][2]) >= data.val_tokens:
            total -= len(heapq.heappop(chosen)[2])
    if total < data.val_tokens or units <= len(chosen):
        raise _too_small(data.val_tokens, f"{total:,} tokens", units)
    chosen.sort(key=lambda item: -item[0])
    validation = np.concatenate([tokens for *_, tokens in chosen])[: data.val_tokens]
    cut = f"{-chosen[-1][0]:032x}"
    if zone_end := inputs["tokenizer"].metrics.get("zone_end"):
        assert cut <= zone_end, "the tokenizer was trained on a held-out document"
    np.save(attempt.path / "validation.npy", validation.astype(dtype_for(encoding.n_vocab + 1)))
    (attempt.path / "split.json").write_text(json.dumps({"cut": cut, "seed": data.split_seed}, indent=1))
    return {
        "val_tokens": len(validation),
        "val_bytes": int(np.array(token_bytes(encoding))[validation].sum()),
        "val_documents": len(chosen),
        "documents": units,
        "val_dropped_tokens": total - len(validation),
        "cut": cut,
    }
