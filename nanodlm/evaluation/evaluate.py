"""The evaluate stage: the bound on held-out text, with its standard error, beside the unigram entropy."""

import json
import math
from typing import Any

import jax
import numpy as np
import tiktoken
from flax import nnx
from jaxtyping import Int

from nanodlm.checkpoints.loading import load_artifact
from nanodlm.config import Config, EvalConfig
from nanodlm.data.rows import evenly_spaced, read
from nanodlm.data.shard import token_counts, unigram_nats
from nanodlm.data.tokenizer import token_sizes
from nanodlm.devices.mesh import cut, make_mesh
from nanodlm.errors import Emit, silent
from nanodlm.evaluation.scoring import make_scorer, score_rows
from nanodlm.evaluation.uncertainty import count_documents, documents_in, ratio_stderr
from nanodlm.model.transformer import Transformer
from nanodlm.store import Artifact, Attempt


def evaluate(config: Config, inputs: dict[str, Artifact], attempt: Attempt, emit: Emit) -> dict[str, Any]:
    """Stage: `score` the validation rows with the bound of the objective they were trained on; write `metrics.json`."""
    model, encoding = load_artifact(inputs["train"])
    shard = inputs["shard"]
    rows = read(shard.file("validation.arrayrecord"), shard.metrics["dtype"])
    chosen = evenly_spaced(len(rows), config.eval.max_rows)
    documents = documents_in([row[row < encoding.n_vocab] for row in rows], encoding.eot_token)[chosen]
    if config.data.rows == "document":  # also where its mark was cut off
        documents = np.stack([chosen, chosen], axis=1)
    rows, counts = [rows[i] for i in chosen], token_counts(shard)
    metrics = score(model, encoding, rows, config.eval, documents=documents, counts=counts, emit=emit)
    metrics["pretokenized"] = config.data.pretokenized  # only their end-of-text marks tell documents
    (attempt.path / "metrics.json").write_text(json.dumps(metrics, indent=1))
    return metrics


def score(
    model: Transformer,
    encoding: tiktoken.Encoding,
    rows: list[np.ndarray],
    options: EvalConfig,
    *,
    documents: Int[np.ndarray, "N 2"],
    counts: Int[np.ndarray, "V"],
    emit: Emit = silent,
) -> dict[str, Any]:
    """Return the bound of rows under the objective that a network carries, whatever weights it was trained on.

    Rows are of equal length but for the last, which may be shorter; ids beyond the encoding's are padding. Every row is
    scored by itself: its bound is on -log p of its tokens without the text before it. Each row gets
    `repeats` draws of noise. The standard error is for other documents: rows share `documents`, from `documents_in`,
    unless there is one document, when they are taken as independent. `counts` are those of the training tokens.

    Bits per byte divide by the bytes of the text; end-of-text marks add nats but no bytes. `val_stderr_over` says
    whether the standard error is one over `documents` or over `rows`.
    """
    scorer, mesh = make_scorer(model), make_mesh(options.batch_size)
    params = jax.device_put(nnx.state(model), jax.NamedSharding(mesh, cut()))
    nats = np.zeros(len(rows))
    for repeat in range(options.repeats):
        done = 0
        noise = jax.random.fold_in(jax.random.key(options.seed), repeat)
        for scored in score_rows(scorer, params, rows, noise, mesh=mesh, batch_size=options.batch_size):
            nats[done : done + len(scored)] += scored / options.repeats
            done += len(scored)
            if done // options.batch_size % 20 == 0 or done == len(rows):
                emit("progress", done=done + repeat * len(rows), total=len(rows) * options.repeats, unit="rows")
    rows = [row[row < encoding.n_vocab] for row in rows]
    tokens, row_tokens = np.concatenate(rows), np.array([len(row) for row in rows])
    sizes = token_sizes(encoding)
    n_bytes, n_characters = (int(n) for n in sizes[tokens].sum(axis=0))
    row_bytes = np.array([sizes[row, 0].sum() for row in rows])
    n_documents = count_documents(documents)
    shared = documents if n_documents > 1 else None
    unigram = unigram_nats(tokens, counts)
    return {
        "val_nats_per_token": float(nats.sum()) / len(tokens),
        "val_nats_per_token_stderr": ratio_stderr(nats, row_tokens, shared),
        "val_bits_per_byte": float(nats.sum()) / math.log(2) / n_bytes,
        "val_bits_per_byte_stderr": ratio_stderr(nats, row_bytes, shared) / math.log(2),
        "val_bits_per_character": float(nats.sum()) / math.log(2) / n_characters,
        "val_stderr_over": "rows" if shared is None else "documents",
        "val_unigram_nats_per_token": unigram,
        "val_unigram_bits_per_byte": unigram * len(tokens) / math.log(2) / n_bytes,
        "scored_tokens": len(tokens),
        "scored_bytes": n_bytes,
        "scored_characters": n_characters,
        "scored_rows": len(rows),
        "scored_documents": n_documents,
    }
