"""The shard stage: documents become rows of token ids in ArrayRecord files."""

from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from tiktoken import Encoding

from nanodlm.config import Config
from nanodlm.data import rows as data_rows
from nanodlm.data.clean import CONTAMINATED, Chosen, held_out_runs
from nanodlm.data.documents import Documents
from nanodlm.data.held_out import Place, halves, in_units
from nanodlm.data.parts import parts, read
from nanodlm.data.tokenizer import load, tokenise_all
from nanodlm.errors import Emit, NanodlmError
from nanodlm.store import Artifact, Attempt, Json

COUNTS = "counts.npy"  # how often each token is trained on; left out of the digest, for the shards determine it


def build_shards(config: Config, inputs: dict[str, Artifact], attempt: Attempt, emit: Emit) -> dict[str, Any]:
    """Write rows of `seq_len` tokens as ArrayRecord, one training shard for each corpus part, and the validation.

    Documents follow each other, texts with an end-of-text mark after each, and are cut into rows; what is left of a
    part after its last whole row is dropped. The validation's last row may be shorter. With `data.weights`, a part is
    gone through as often as its source's weight says.
    """
    length = config.model.seq_len
    encoding = load(inputs["tokenizer"].local())
    held_out = inputs["split"].metrics
    cut = held_out["cut"]
    validation = np.load(inputs["split"].local() / "validation.npy", allow_pickle=False)
    shared, sources = held_out_runs(config.data, encoding, validation), inputs["download"].metrics.get("part_sources")
    names = parts(inputs["download"])
    finished = attempt.adopt_finished(map(data_rows.name, range(len(names))))
    infos = {i: finished[name] for i in range(len(names)) if (name := data_rows.name(i)) in finished}
    missing = [i for i in range(len(names)) if i not in infos]
    if missing:
        folder = inputs["download"].local(*(names[i] for i in missing))
        for i in missing:
            weight = (config.data.weights or (1,))[sources[i] if sources else 0]  # of the hub there is one source
            chosen = Chosen(config.data, shared, weight)
            infos[i] = _write_shard(config, encoding, held_out, folder / names[i], attempt, i, chosen)
            emit("progress", done=len(infos), total=len(names), unit="shards")
    shards = [infos[i] for i in range(len(names))]
    fields = ["train_rows", "train_tokens", "train_documents", "dropped_tokens"]
    fields += CONTAMINATED if config.data.decontaminate else ()
    totals = {field: sum(info[field] for info in shards) for field in fields}
    if totals["train_rows"] == 0:
        few = f"what is left for training has fewer than seq_len ({length}) tokens"
        remedy = "add text, or lower --model.seq_len" + (" or --data.val_tokens" if isinstance(cut, str) else "")
        raise NanodlmError(f"no training row: {few}; {remedy}")
    first_key = min(info["first_key"] for info in shards)
    assert isinstance(cut, list) or first_key > cut, "a held-out document is among the training documents"
    if len(validation) <= length:  # nobody should learn it after the training
        few = f"{len(validation):,} validation tokens are one row of seq_len ({length}), which has no standard error"
        remedy = "raise --data.val_tokens" if isinstance(cut, str) else "add text"
        raise NanodlmError(f"{few}; {remedy}, or lower --model.seq_len")
    if totals["dropped_tokens"]:
        share = totals["dropped_tokens"] / (totals["dropped_tokens"] + totals["train_tokens"])
        what = f"{totals['dropped_tokens']:,} tokens ({share:.2%}) after the last whole row of each part are dropped"
        emit("message", text=what)
    if config.data.decontaminate:
        left_out = f"{totals['contaminated_documents']:,} documents of {totals['contaminated_bytes']:,} bytes"
        emit("message", text=f"{left_out} share words with what is held out, and are not trained on")
    val_rows = [validation[i : i + length] for i in range(0, len(validation), length)]
    data_rows.write(attempt.path / "validation.arrayrecord", val_rows)
    frequencies = np.sum([info["counts"] for info in shards], axis=0)
    np.save(attempt.path / COUNTS, frequencies)
    if sources:
        totals["source_tokens"] = np.bincount(sources, [info["train_tokens"] for info in shards]).astype(int).tolist()
    return {
        **totals,
        "rows_per_shard": [info["train_rows"] for info in shards],
        "val_tokens": len(validation),
        "val_rows": len(val_rows),
        "val_bytes": held_out["val_bytes"],
        "val_unigram_nats_per_token": unigram_nats(validation, frequencies),
        "seq_len": length,
        "n_vocab": encoding.n_vocab,
        "dtype": np.dtype(data_rows.dtype_for(encoding.n_vocab + 1)).name,
        # Validation keys are at most the first of these, training keys at least the second: the sides are disjoint.
        **({"largest_validation_key": cut, "smallest_training_key": first_key} if isinstance(cut, str) else {}),
    }


def token_counts(shard: Artifact) -> np.ndarray:
    """Return how often each token occurs in the training rows of a shard artifact, (V,)."""
    if any(file["path"] == COUNTS for file in shard.manifest["files"]):
        return np.load(shard.file(COUNTS), allow_pickle=False)
    counts = np.zeros(shard.metrics["n_vocab"], np.int64)  # an earlier version did not write them
    for part in range(len(shard.metrics["rows_per_shard"])):
        tokens = np.concatenate(data_rows.read(shard.file(data_rows.name(part)), shard.metrics["dtype"]) or [[]])
        counts += np.bincount(tokens.astype(int), minlength=len(counts))
    return counts


def unigram_nats(tokens: Int[np.ndarray, "N"], counts: Int[np.ndarray, "V"]) -> float:
    """Return what tokens cost a model without context, in nats per token, given the counts of training.

    Each count is one more than it was, so that no token is impossible (Laplace's rule of succession).

    >>> round(unigram_nats(np.array([0, 1]), np.array([2, 0])), 4)  # -(log 3/4 + log 1/4) / 2
    0.837
    """
    return float(np.log(counts.sum() + len(counts)) - np.log(counts[tokens] + 1).mean())


def _write_shard(
    config: Config, encoding: Encoding, held_out: Json, part: Path, attempt: Attempt, index: int, chosen: Chosen
) -> dict[str, Any]:
    """Make one training shard, a finished part of the attempt, and return what it was finished with."""
    length, seed, name = config.model.seq_len, config.data.split_seed, data_rows.name(index)
    counts, smallest = np.zeros(encoding.n_vocab, np.int64), "g"  # which is above all keys
    goes_on = False  # whether the last document does, in what is held out
    cut: str | Place = held_out["cut"]
    rest = np.zeros(0, data_rows.dtype_for(encoding.n_vocab + 1))

    def kept() -> Iterator[Documents]:
        nonlocal smallest, goes_on
        if isinstance(cut, list):
            for before, _, goes_on in halves(read(part), index, cut):
                yield before
                if goes_on:
                    return
            return
        for batch in in_units(read(part), held_out.get("unit_rows", 1)):
            keys = [key.hex() for key in batch.keys(seed)]
            smallest = min([smallest, *(key for key in keys if key > cut)])
            yield batch.only(np.array([key > cut for key in keys]))

    def whole_rows(turn: int) -> Iterator[np.ndarray]:
        nonlocal rest, counts
        for tokens, after in pairwise(chain(tokenise_all(encoding, chosen.of(kept(), turn)), [None])):
            assert tokens
            made_up = after is None and goes_on and not config.data.pretokenized  # the mark of a document that goes on
            stream = np.concatenate([rest, tokens.flat[: len(tokens.flat) - made_up]])
            end = len(stream) // length * length
            counts += np.bincount(stream[:end], minlength=len(counts))
            rest = stream[end:].copy()
            yield stream[:end].reshape(-1, length)

    data_rows.write(attempt.path / name, chain.from_iterable(map(whole_rows, range(chosen.turns))))
    tokens = int(counts.sum())
    info = {"train_rows": tokens // length, "train_tokens": tokens, "train_documents": chosen.documents}
    info |= {"dropped_tokens": len(rest), "first_key": smallest, "counts": counts.tolist(), **chosen.counts}
    attempt.finish(name, [name], **info)
    return info
