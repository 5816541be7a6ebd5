"""The evaluate stage: the bound on held-out text and on further sets, with its standard error."""

import json
import math
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import tiktoken
from jaxtyping import Float, Int

from nanodlm.checkpoints.loading import load_artifact
from nanodlm.config import Config, ScoreConfig
from nanodlm.data import sets
from nanodlm.data.readers import Bad
from nanodlm.data.rows import evenly_spaced, read
from nanodlm.data.shard import token_counts, unigram_nats
from nanodlm.data.tokenizer import token_sizes
from nanodlm.errors import Emit, NanodlmError, silent
from nanodlm.evaluation.scoring import Drawn, draw
from nanodlm.evaluation.uncertainty import count_documents, documents_in, interval, ratio_stderr
from nanodlm.model.transformer import Transformer
from nanodlm.store import Artifact, Attempt

ROW = [("set", "<i4"), ("nats", "<f8"), ("tokens", "<i4"), ("bytes", "<i4"), ("first", "<i8"), ("last", "<i8")]
COUNTS = ("tokens", "bytes", "characters", "rows", "documents")


@dataclass(frozen=True)
class Text:
    """A stream of documents in rows, of each of which so many tokens at the beginning are given.

    Rows are of equal length but for the last, which may be shorter; ids beyond the encoding's are padding. What is
    scored of them follows each other.
    """

    rows: list[np.ndarray]
    given: Int[np.ndarray, "N"]
    scored: list[np.ndarray]  # the other tokens of each
    documents: Int[np.ndarray, "N 2"]  # the first and the last that is scored in each, see `documents_in`
    context: str = "each by itself"  # what of each row is given, for people

    @classmethod
    def cut(cls, tokens: Int[np.ndarray, "T"], length: int, end_of_text: int, options: ScoreConfig) -> Self:
        """Cut tokens into rows, or for a stride into rows that overlap, each token being scored once."""
        stride = options.stride or length
        if stride > length:
            raise NanodlmError(f"a stride of {stride} leaves out tokens: rows have {length}")
        if stride == length or len(tokens) <= length:
            starts, given = np.arange(0, len(tokens), length), np.zeros(-(-len(tokens) // length), int)
            context = cls.context
        else:
            context = f"the last {stride} given those before"
            ends = np.array([*range(length, len(tokens), stride), len(tokens)])
            starts, given = ends - length, np.concatenate([[0], length - np.diff(ends)])
        rows = [tokens[start : start + length] for start in starts]
        scored = [row[n:][row[n:] <= end_of_text] for row, n in zip(rows, given, strict=True)]
        documents, chosen = documents_in(scored, end_of_text), evenly_spaced(len(rows), options.max_rows)
        return cls([rows[i] for i in chosen], given[chosen], [scored[i] for i in chosen], documents[chosen], context)

    def of_tokens(self, end_of_text: int) -> Int[np.ndarray, "T"]:
        """Return the document of each scored token."""
        parts = zip(self.scored, self.documents[:, 0], strict=True)
        return np.concatenate([first + np.cumsum(part == end_of_text) - (part == end_of_text) for part, first in parts])


def evaluate(config: Config, inputs: dict[str, Artifact], attempt: Attempt, emit: Emit) -> dict[str, Any]:
    """Stage: `score` the validation rows, and every set of `eval.sets`, with the bound of the objective trained on.

    It writes `metrics.json`; `rows.npy`, the nats of every row, by which two models can be compared in pairs; and
    `bound_profile.json`, the validation bound by position and by noise.
    """
    model, encoding = load_artifact(inputs["train"])
    shard, length, end = inputs["shard"], config.model.seq_len, encoding.eot_token
    counts = token_counts(shard)
    held_out = np.concatenate(read(shard.file("validation.arrayrecord"), shard.metrics["dtype"]))
    streams = {"": (held_out, Bad())} | {word: sets.tokens(word, config.data, encoding) for word in config.eval.sets}
    found, tables = [], []
    for number, (word, (tokens, bad)) in enumerate(streams.items()):
        if bad.counts:
            emit("message", text=f"left out of {word}: {bad}")
        text = Text.cut(tokens, length, end, config.eval)
        if not word and config.data.rows == "document":  # also where its mark was cut off
            text = replace(text, documents=np.arange(len(text.rows))[:, None].repeat(2, axis=1))
        metrics, drawn = score(model, encoding, text, config.eval, counts=counts, emit=emit)
        found.append({"file": sets.name_of(word), **metrics, "left_out": bad.counts} if word else metrics)
        tables.append(by_row(text, drawn.nats, encoding, number))
        if not word:
            (attempt.path / "bound_profile.json").write_text(json.dumps(drawn.profile, indent=1))
    # Of pre-tokenised rows only their end-of-text marks tell documents.
    metrics = {f"{'scored' if k in COUNTS else 'val'}_{k}": v for k, v in found[0].items()}
    metrics |= {"pretokenized": config.data.pretokenized, "sets": found[1:]}
    (attempt.path / "metrics.json").write_text(json.dumps(metrics, indent=1))
    np.save(attempt.path / "rows.npy", np.concatenate(tables))
    return metrics


def by_row(text: Text, nats: Float[np.ndarray, "T"], encoding: tiktoken.Encoding, number: int = 0) -> np.ndarray:
    """Return a table of rows: the number of their set, nats, tokens and bytes, first and last document."""
    sizes, table = token_sizes(encoding)[:, 0], np.zeros(len(text.rows), ROW)
    lengths = np.array([len(part) for part in text.scored])
    table["set"], table["tokens"], table["bytes"] = number, lengths, [sizes[part].sum() for part in text.scored]
    table["nats"] = np.add.reduceat(nats, np.cumsum(lengths) - lengths)
    table["first"], table["last"] = text.documents.T
    return table


def score(
    model: Transformer,
    encoding: tiktoken.Encoding,
    text: Text,
    options: ScoreConfig,
    *,
    counts: Int[np.ndarray, "V"] | None = None,
    emit: Emit = silent,
) -> tuple[dict[str, Any], Drawn]:
    """Return the bound of a text under the objective that a network carries, and what each scored token has of it.

    The bound is on -log p of each row's scored tokens given those before them in the row, whatever weights it was
    trained on. The standard error, and the 95% interval, are for other documents of the kind, with this noise; where
    there is one document, rows are taken as independent, as `stderr_over` says, and of one row there is none.
    `noise_stderr` is the share of the noise in it, in bits per byte; after one draw there is none.

    Bits per byte divide by the bytes of the text; end-of-text marks add nats but no bytes. The unigram entropy is that
    of the `counts` of training tokens.
    """
    tokens, sizes = np.concatenate(text.scored), token_sizes(encoding)
    n_bytes, n_characters = (int(n) for n in sizes[tokens].sum(axis=0))
    bits = math.log(2) * n_bytes
    drawn = draw(model, text.rows, text.given, options, within=(options.precision or 0.0) * bits, emit=emit)
    total, rows = float(drawn.nats.sum()), by_row(text, drawn.nats, encoding)
    n_documents = count_documents(text.documents)
    shared, n = (text.documents, min(len(rows), n_documents)) if n_documents > 1 else (None, len(rows))
    errors = {of: ratio_stderr(rows["nats"], rows[of], shared) if n > 1 else None for of in ("tokens", "bytes")}
    error = errors["bytes"] and errors["bytes"] / math.log(2)
    layout = "" if model.padding is None else ", of a stream, in which it was not trained"
    kind = model.objective.traits
    if any(row[-1] > encoding.eot_token for row in text.rows):
        told = ", padded" + ": given how long each text is" * (not kind.edges_known)
        layout = ", what follows masked" if model.padding is None and kind.masks else told
    metrics = {
        "nats_per_token": total / len(tokens),
        "nats_per_token_stderr": errors["tokens"],
        "perplexity": math.exp(total / len(tokens)),
        "bits_per_byte": total / bits,
        "bits_per_byte_stderr": error,
        "bits_per_byte_interval": error and interval(total / bits, error, n),
        "bits_per_character": total / math.log(2) / n_characters,
        "stderr_over": "rows" if shared is None else "documents",
        "noise_stderr": drawn.noise_stderr and drawn.noise_stderr / bits,
        "draws": len(drawn.by_row),
        "protocol": f"{model.objective.kind}, rows of {len(text.rows[0])} tokens, {text.context}{layout}",
        **dict(zip(COUNTS, (len(tokens), n_bytes, n_characters, len(rows), n_documents), strict=True)),
    }
    if counts is not None:
        unigram = unigram_nats(tokens, counts)
        metrics |= {"unigram_nats_per_token": unigram, "unigram_bits_per_byte": unigram * len(tokens) / bits}
    return metrics, drawn
