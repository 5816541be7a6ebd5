"""The shard stage: documents become rows of token ids in ArrayRecord files."""

import json
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from tiktoken import Encoding

from nanodlm.config import Config
from nanodlm.data import rows as data_rows
from nanodlm.data.card import CARD, Glance, card
from nanodlm.data.clean import CONTAMINATED, Chosen, scored_runs
from nanodlm.data.documents import Documents
from nanodlm.data.held_out import Place, check_rows, halves, in_units
from nanodlm.data.layout import lay_out
from nanodlm.data.parts import parts, read
from nanodlm.data.tokenizer import load, token_sizes, tokenise_all
from nanodlm.errors import Emit, NanodlmError, counted
from nanodlm.store import Artifact, Attempt, Json

COUNTS = "counts.npy"  # how often each token is trained on; left out of the digest, for the shards determine it


def build_shards(config: Config, inputs: dict[str, Artifact], attempt: Attempt, emit: Emit) -> dict[str, Any]:
    """Write rows of `seq_len` tokens as ArrayRecord, one training shard for each corpus part, and the validation.

    Documents follow each other, texts with an end-of-text mark after each, and are cut into rows; what is left of a
    part after its last whole row is dropped. The validation's last row may be shorter. Or rows hold whole documents
    and padding, as `layout` says. With `data.weights`, a part is gone through as often as its source's weight says.
    """
    length = config.model.seq_len
    encoding = load(inputs["tokenizer"].local())
    held_out = inputs["split"].metrics
    cut = held_out["cut"]
    validation = np.load(inputs["split"].file("validation.npy"), allow_pickle=False)
    scored, names = scored_runs(config, encoding, validation), parts(inputs["download"])
    sources = inputs["download"].metrics.get("part_sources")
    finished = attempt.adopt_finished(map(data_rows.name, range(len(names))))
    infos = {i: finished[name] for i in range(len(names)) if (name := data_rows.name(i)) in finished}
    missing = [i for i in range(len(names)) if i not in infos]
    if missing:
        folder = inputs["download"].local(*(names[i] for i in missing))
        for i in missing:
            weight = (config.data.weights or (1,))[sources[i] if sources else 0]  # of the hub there is one source
            chosen = Chosen(config.data, scored, weight)
            infos[i] = _write_shard(config, encoding, held_out, folder / names[i], attempt, i, chosen)
            emit("progress", done=len(infos), total=len(names), unit="shards")
    shards = [infos[i] for i in range(len(names))]
    totals = _totals(shards, CONTAMINATED if config.data.decontaminate else (), scored or ())
    if totals["train_rows"] == 0:
        remedy = "add text, or lower --model.seq_len" + (" or --data.val_tokens" if isinstance(cut, str) else "")
        few = f"what is left for training has fewer than seq_len ({length}) tokens"
        raise NanodlmError(f"no training row: {few}; {remedy}")
    first_key = min(info["first_key"] for info in shards)
    assert isinstance(cut, list) or first_key > cut, "a held-out document is among the training documents"
    val_rows, validation, lost = _validation(config, encoding, validation)
    check_rows(config.data, len(val_rows), len(validation), length)
    padding = totals["train_rows"] * length - totals["train_tokens"]
    totals |= {"padding_share": padding / (totals["train_rows"] * length), "val_dropped_tokens": lost}
    for said in _losses(config, totals, len(validation)):
        emit("message", text=said)
    data_rows.write(attempt.path / "validation.arrayrecord", val_rows)
    frequencies = np.sum([_counts(info) for info in shards], axis=0)
    np.save(attempt.path / COUNTS, frequencies)
    (attempt.path / CARD).write_text(json.dumps(card(encoding, inputs, shards, frequencies), indent=1))
    if sources:
        totals["source_tokens"] = np.bincount(sources, [info["train_tokens"] for info in shards]).astype(int).tolist()
    return {
        **totals,
        "rows_per_shard": [info["train_rows"] for info in shards],
        "val_tokens": len(validation),
        "val_rows": len(val_rows),
        "val_bytes": int(token_sizes(encoding)[validation, 0].sum()),
        "val_unigram_nats_per_token": unigram_nats(validation, frequencies),
        "seq_len": length,
        "n_vocab": encoding.n_vocab,
        "dtype": np.dtype(data_rows.dtype_for(encoding.n_vocab + 1)).name,
        # Validation keys are at most the first of these, training keys at least the second: the sides are disjoint.
        **({"largest_validation_key": cut, "smallest_training_key": first_key} if isinstance(cut, str) else {}),
    }


def _totals(shards: list[dict[str, Any]], contaminated: Iterable[str], scored: Iterable[str]) -> dict[str, Any]:
    """Add up what is counted of each shard, and what it shared with each set that is scored."""
    fields = ("train_rows", "train_tokens", "train_documents", "dropped_tokens", "cut_documents", *contaminated)
    # An attempt that an earlier version began has cut no documents.
    totals: dict[str, Any] = {field: sum(info.get(field, 0) for info in shards) for field in fields}
    sets = {name: sum(info.get("contaminated", {}).get(name, 0) for info in shards) for name in scored}
    return {**totals, **({"contaminated": sets} if sets else {})}


def token_counts(shard: Artifact) -> np.ndarray:
    """Return how often each token occurs in the training rows of a shard artifact, (V,)."""
    return np.load(shard.file(COUNTS), allow_pickle=False)


def unigram_nats(tokens: Int[np.ndarray, "N"], counts: Int[np.ndarray, "V"]) -> float:
    """Return what tokens cost a model without context, in nats per token, given the counts of training.

    Each count is one more than it was, so that no token is impossible (Laplace's rule of succession).

    >>> round(unigram_nats(np.array([0, 1]), np.array([2, 0])), 4)  # -(log 3/4 + log 1/4) / 2
    0.837
    """
    return float(np.log(counts.sum() + len(counts)) - np.log(counts[tokens] + 1).mean())


def _counts(info: Json) -> np.ndarray:
    """Return how often each token is in a shard, (V,), which an earlier version has finished with a list of it."""
    counts = info["counts"]
    return np.array(counts) if isinstance(counts, list) else np.frombuffer(bytes.fromhex(counts), np.int64)


def _validation(config: Config, encoding: Encoding, tokens: np.ndarray) -> tuple[list[np.ndarray], np.ndarray, int]:
    """Return the rows of what is held out, the tokens in them, and how many tokens are in none."""
    length = config.model.seq_len
    if config.data.rows == "stream":
        return [tokens[i : i + length] for i in range(0, len(tokens), length)], tokens, 0
    laid = lay_out(config, tokens, encoding.eot_token, last=True, held_out=True)
    rows = np.concatenate(list(laid.rows))
    return list(rows), rows[rows < encoding.n_vocab], laid.dropped


def _losses(config: Config, totals: Json, val_tokens: int) -> Iterator[str]:
    """Say how much of the rows is padding, which tokens lie in no row, and what is not trained on."""
    if config.data.decontaminate:
        documents = counted(totals["contaminated_documents"], "documents")
        of_each = ", ".join(f"{count:,} with {name}" for name, count in totals["contaminated"].items())
        bytes_ = counted(totals["contaminated_bytes"], "bytes")
        yield f"not trained on, for words in common with what is scored: {documents} of {bytes_} ({of_each})"
    sides = ((totals["dropped_tokens"], totals["train_tokens"]), (totals["val_dropped_tokens"], val_tokens))
    train, held_out = (f"{lost:,} tokens ({lost / max(1, lost + kept):.2%})" for lost, kept in sides)
    if config.data.rows != "stream":
        padding = f"{totals['padding_share']:.2%} of the training rows is padding"
        cut = f"cut: {counted(totals['cut_documents'], 'documents')}, of which {train} are dropped"
        yield f"{padding}; {cut}, and {held_out} of what is held out"
    elif totals["dropped_tokens"]:
        yield f"{train} after the last whole row of each part are dropped"


def _write_shard(
    config: Config, encoding: Encoding, held_out: Json, part: Path, attempt: Attempt, index: int, chosen: Chosen
) -> dict[str, Any]:
    """Make one training shard, a finished part of the attempt, and return what it was finished with."""
    length, seed, name = config.model.seq_len, config.data.split_seed, data_rows.name(index)
    counts = np.zeros(encoding.n_vocab + 1, np.int64)  # the last is that of padding
    longer, dropped, smallest = 0, 0, "g"  # which is above all keys
    goes_on = False  # whether the last document does, in what is held out
    cut: str | Place = held_out["cut"]
    rest = np.zeros(0, data_rows.dtype_for(encoding.n_vocab + 1))
    glance = Glance()

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
        nonlocal rest, counts, longer, dropped
        for tokens, after in pairwise(chain(glance.at(tokenise_all(encoding, chosen.of(kept(), turn))), [None])):
            assert tokens
            made_up = after is None and goes_on and chosen.has_last and not config.data.pretokenized
            # It is the mark of a document that goes on.
            stream = np.concatenate([rest, tokens.flat[: len(tokens.flat) - made_up]])
            laid = lay_out(config, stream, encoding.eot_token, last=after is None)
            rest, longer, dropped = stream[laid.end :].copy(), longer + laid.longer, dropped + laid.dropped
            for rows in laid.rows:
                counts += np.bincount(rows.ravel(), minlength=len(counts))
                yield rows

    data_rows.write(attempt.path / name, chain.from_iterable(map(whole_rows, range(chosen.turns))))
    info = {"train_rows": int(counts.sum()) // length, "train_tokens": int(counts[:-1].sum())}
    info |= {"train_documents": chosen.documents, "cut_documents": longer, "dropped_tokens": dropped + len(rest)}
    info |= {"first_key": smallest, "counts": counts[:-1].tobytes().hex(), **chosen.counts, **glance.info()}
    info |= {"contaminated": chosen.alike}
    attempt.finish(name, [name], **info)
    return info
