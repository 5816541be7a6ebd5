"""The stages between text and training: which documents are held out, the tokenizer, the shards of token rows.

What is held out is decided by content alone. Units (documents, or rows of pre-tokenised data) are sorted by a
keyed hash; the front gives exactly `val_tokens` validation tokens, the rest of the unit where the budget ends is
dropped, and every unit with a larger key is for training. Equal documents have equal keys, so duplicates stay on one
side, and new data moves units only at the budget's edge.
"""

import hashlib
import heapq
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from nanodlm import corpus, shards, tokenizer
from nanodlm.config import Config
from nanodlm.errors import NanodlmError
from nanodlm.store import Artifact, Attempt

MAX_BPE_BYTES = 200_000_000


def document_key(content: str | list[int], seed: int) -> str:
    """Key of a unit: 32 hex digits, uniform over contents, a function of content and seed only.

    >>> document_key("a", 0) == document_key("a", 0) != document_key("a", 1)
    True
    """
    data = content.encode() if isinstance(content, str) else np.asarray(content, "<i4").tobytes()
    return hashlib.blake2b(data, key=seed.to_bytes(8, "little"), digest_size=16).hexdigest()


def _keyed_documents(folder: Path, seed: int) -> Iterator[tuple[str, Any]]:
    for part in sorted(folder.glob("part-*.parquet")):
        for document in corpus.documents(part):
            yield document_key(document, seed), document


def build_tokenizer(
    config: Config, inputs: dict[str, Artifact], attempt: Attempt, emit: Callable[..., None]
) -> dict[str, Any]:
    """Stage: make the encoding. A trained one sees only documents that the split cannot hold out.

    How many documents the split takes depends on the encoding. So first a zone at the front of their order is set
    aside, the encoding is trained on the rest, and the zone is counted with it; if that gives fewer than
    `val_tokens` tokens, the zone grows and the training starts over.

    Raises:
        NanodlmError: When the corpus is too small for the validation split.
    """
    data = config.data
    if data.tokenizer != "bpe":
        fixed = tokenizer.gpt2() if data.tokenizer == "gpt2" else tokenizer.plain_bytes()
        tokenizer.save(fixed, attempt.path)
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
        emit("message", text=f"training BPE on the documents after the first {zone_bytes / 1e6:.1f} MB")
        after_zone = (text for key, text in _keyed_documents(folder, data.split_seed) if key > zone_end)
        encoding = tokenizer.train_bpe(_up_to(MAX_BPE_BYTES, after_zone), data.vocab_size)
        zone = (text for key, text in _keyed_documents(folder, data.split_seed) if key <= zone_end)
        tokens = sum(len(encoding.encode_ordinary(text)) + 1 for text in zone)
        if tokens >= data.val_tokens:
            break
        target = zone_bytes * 1.02 * data.val_tokens / tokens
    tokenizer.save(encoding, attempt.path)
    return {"n_vocab": encoding.n_vocab, "zone_end": zone_end, "zone_bytes": zone_bytes, "zone_tokens": tokens}


def _too_small(val_tokens: int, size: str, units: int) -> NanodlmError:
    return NanodlmError(
        f"the corpus is smaller than the validation split: {size} in {units:,} documents cannot give "
        f"{val_tokens:,} validation tokens and leave some to train on; add text, lower --data.val_tokens, "
        "or cut long .txt files up with --data.sample_by paragraph"
    )


def _up_to(limit: int, texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        if limit <= 0:
            return
        limit -= len(text)
        yield text


def build_split(
    config: Config, inputs: dict[str, Artifact], attempt: Attempt, emit: Callable[..., None]
) -> dict[str, Any]:
    """Stage: choose the held-out units and write their tokens (`validation.npy`) and the cut (`split.json`).

    One pass keeps the units with the smallest keys, just as many as the budget needs, so memory does not grow with
    the corpus.

    Raises:
        NanodlmError: When the corpus has too few tokens, or a row has ids that the tokenizer lacks.
    """
    data = config.data
    encoding = tokenizer.load(inputs["tokenizer"].local())
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
    lengths = np.array(tokenizer.token_bytes(encoding))
    cut = f"{-chosen[-1][0]:032x}"
    if zone_end := inputs["tokenizer"].metrics.get("zone_end"):
        assert cut <= zone_end, "the tokenizer was trained on a held-out document"
    np.save(attempt.path / "validation.npy", validation.astype(shards.dtype_for(encoding.n_vocab + 1)))
    (attempt.path / "split.json").write_text(json.dumps({"cut": cut, "seed": data.split_seed}, indent=1))
    return {
        "val_tokens": len(validation),
        "val_bytes": int(lengths[validation].sum()),
        "val_documents": len(chosen),
        "documents": units,
        "val_dropped_tokens": total - len(validation),
        "cut": cut,
    }


def tokenise(encoding: tiktoken.Encoding, document: str | list[int]) -> np.ndarray:
    """Token ids (int64) of a document, with the end-of-text mark after a text; rows of ids are only checked.

    Raises:
        NanodlmError: For ids outside the encoding.

    >>> tokenise(tokenizer.plain_bytes(), "Hi").tolist()
    [72, 105, 256]
    """
    if isinstance(document, str):
        return np.array([*encoding.encode_ordinary(document), encoding.eot_token])
    ids = np.asarray(document)
    if ids.min() < 0 or ids.max() >= encoding.n_vocab:
        raise NanodlmError(
            f"a row holds token id {ids.max() if ids.max() >= encoding.n_vocab else ids.min()}, but {encoding.name} "
            f"has ids 0 to {encoding.n_vocab - 1}: check --data.tokenizer and --data.column"
        )
    return ids


def build_shards(
    config: Config, inputs: dict[str, Artifact], attempt: Attempt, emit: Callable[..., None]
) -> dict[str, Any]:
    """Stage: write rows of `seq_len` tokens as ArrayRecord, one training shard per corpus part, and the validation.

    Texts follow each other with an end-of-text mark after each, and are cut into rows; what is left of a part after
    its last whole row is dropped. Pre-tokenised rows are cut one by one. The validation's last row may be shorter.

    Raises:
        NanodlmError: When there is not one whole row to train on.
    """
    length = config.model.seq_len
    encoding = tokenizer.load(inputs["tokenizer"].local())
    cut = _cut(inputs["split"])
    parts = corpus.parts(inputs["download"])
    totals = {"train_rows": 0, "train_tokens": 0, "train_documents": 0, "dropped_tokens": 0, "dropped_documents": 0}
    infos: dict[int, dict[str, Any]] = {}

    def done(index: int, info: dict[str, Any]) -> None:
        infos[index] = info
        emit("progress", done=len(infos), total=len(parts), unit="shards")

    for i in range(len(parts)):
        if info := attempt.adopt(shards.name(i)):
            done(i, info)
    missing = [i for i in range(len(parts)) if i not in infos]
    if missing:
        folder = inputs["download"].local(*(parts[i] for i in missing))
        for i in missing:
            done(i, _write_shard(config, encoding, cut, folder / parts[i], attempt, i, os.cpu_count() or 1))
    for info in infos.values():
        for field in totals:
            totals[field] += info[field]
    rows_per_shard = [infos[i]["train_rows"] for i in range(len(parts))]
    first_key = min((info["first_key"] for info in infos.values()), default="f" * 32)
    if totals["train_rows"] == 0:
        raise NanodlmError(
            f"no training row: the documents left after the validation split have fewer than seq_len ({length}) "
            "tokens; add text, or lower --model.seq_len or --data.val_tokens"
        )
    assert first_key > cut, "a held-out document is among the training documents"
    validation = np.load(inputs["split"].local() / "validation.npy", allow_pickle=False)
    val_rows = [validation[i : i + length] for i in range(0, len(validation), length)]
    shards.write(attempt.path / "validation.arrayrecord", val_rows)
    return {
        **totals,
        "rows_per_shard": rows_per_shard,
        "val_tokens": len(validation),
        "val_rows": len(val_rows),
        "val_bytes": inputs["split"].metrics["val_bytes"],
        "seq_len": length,
        "n_vocab": encoding.n_vocab,
        "dtype": np.dtype(shards.dtype_for(encoding.n_vocab + 1)).name,
        # Validation keys are at most the first of these, training keys at least the second: the sides are disjoint.
        "largest_validation_key": cut,
        "smallest_training_key": first_key,
    }


def build_shard(config: Config, inputs: dict[str, Artifact], attempt: Attempt, index: int) -> dict[str, Any]:
    """One shard of the shard stage, from its part of the corpus alone, as a finished part of the attempt.

    It uses one thread: whoever makes one shard at a time makes several beside each other.

    Args:
        config: The run's configuration.
        inputs: The stage's input artifacts; of the corpus only one part is fetched.
        attempt: Any attempt at the stage; a later one adopts the shard from it.
        index: Which part of the corpus, from 0.

    Returns:
        What the part was finished with.
    """
    encoding = tokenizer.load(inputs["tokenizer"].local())
    part = inputs["download"].file(corpus.parts(inputs["download"])[index])
    return _write_shard(config, encoding, _cut(inputs["split"]), part, attempt, index, threads=1)


def _cut(split: Artifact) -> str:
    """The largest key that is held out."""
    return json.loads(split.file("split.json").read_text())["cut"]


def _write_shard(
    config: Config, encoding: tiktoken.Encoding, cut: str, part: Path, attempt: Attempt, index: int, threads: int
) -> dict[str, Any]:
    data, name = config.data, shards.name(index)
    kept, dropped, smallest = [], 0, "f" * 32
    for document in corpus.documents(part):
        key = document_key(document, data.split_seed)
        if key > cut:
            kept.append(document)
            smallest = min(smallest, key)
        else:
            dropped += key == cut
    rows, left = _rows(encoding, kept, config.model.seq_len, data.pretokenized, threads)
    shards.write(attempt.path / name, rows.astype(shards.dtype_for(encoding.n_vocab + 1)))
    info = {
        "train_rows": len(rows),
        "train_tokens": rows.size,
        "train_documents": len(kept),
        "dropped_tokens": left,
        "dropped_documents": dropped,
        "first_key": smallest,
    }
    attempt.finish(name, [name], **info)
    return info


def _rows(
    encoding: tiktoken.Encoding, documents: list[Any], length: int, pretokenized: bool, threads: int
) -> tuple[np.ndarray, int]:
    """Rows (N, length), and the number of tokens left over."""
    if pretokenized:
        streams = [tokenise(encoding, ids) for ids in documents]
    else:
        texts = encoding.encode_ordinary_batch(documents, num_threads=threads)
        streams = [np.concatenate([np.array([*ids, encoding.eot_token]) for ids in texts])] if texts else []
    whole = [stream[: len(stream) // length * length].reshape(-1, length) for stream in streams]
    rows = np.concatenate(whole) if whole else np.empty((0, length), np.int64)
    return rows, sum(len(stream) for stream in streams) - rows.size
