"""The evaluate stage: the bound on held-out text, with its standard error, beside the unigram entropy."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from nanodlm import sharding, shards, tokenizer
from nanodlm.checkpoint import load_folder, make_objective
from nanodlm.config import Config, load_config
from nanodlm.errors import NanodlmError
from nanodlm.metrics import bits_per_byte
from nanodlm.model import segments
from nanodlm.store import Artifact, Attempt


def unigram_nats(tokens: Int[np.ndarray, "N"]) -> float:
    """Entropy of the tokens' own frequencies, in nats per token: what the best model without context scores.

    >>> round(unigram_nats(np.array([0, 1, 0, 1])), 4)
    0.6931
    """
    counts = np.bincount(tokens)
    p = counts[counts > 0] / len(tokens)
    return float(-(p * np.log(p)).sum())


def evaluate(
    config: Config, inputs: dict[str, Artifact], attempt: Attempt, emit: Callable[..., None] = lambda *_, **__: None
) -> dict[str, Any]:
    """Stage: score the validation rows with the bound of the objective they were trained on (see nanodlm/losses.py).

    Noise takes the count form, which has the least variance and no schedule in it; the autoregressive likelihood has no
    noise.

    Every row is scored by itself: its bound is on -log p of its tokens without the text before it. Each row gets
    `eval.repeats` draws of noise. The standard error is that of the mean over rows taken as independent: it covers
    the noise and the choice of rows, not that rows of one document resemble each other.

    Raises:
        NanodlmError: When there are fewer than two rows, which have no standard error.

    Returns:
        `val_nats_per_token`, `val_bits_per_byte`, `val_bits_per_byte_stderr`, `val_unigram_bits_per_byte` and counts.
        Bits per byte divide by the bytes of the text; end-of-text marks add nats but no bytes.
    """
    run = inputs["train"].local()
    trained = load_config(str(run / "config.json"))
    model, encoding = load_folder(run)
    folder = inputs["shard"].local(only="validation")
    rows = shards.read(folder / "validation.arrayrecord", inputs["shard"].metrics["dtype"])[: config.eval.max_rows]
    if len(rows) < 2:
        raise NanodlmError("one validation row has no standard error: raise --data.val_tokens or lower --model.seq_len")
    objective = replace(make_objective(trained, encoding), estimator="count", times="systematic", weighting="bound")
    graphdef, params = nnx.split(model)

    @jax.jit
    def nats_per_row(params: Any, x_0: Int[Array, "B L"], key: Key[Array, ""]) -> Float[Array, "B"]:
        # Document edges would tell where the masked end-of-text marks are, and the number would not be a bound. From
        # left to right they are known: a mark that was read ends a document.
        known = objective.kind == "autoregressive" and trained.data.isolate_documents
        segment_ids = segments(x_0, objective.mask_id - 1) if known else None
        noised = objective.corrupt(x_0, key, segment_ids)
        logits = objective.logits(nnx.merge(graphdef, params), x_0, noised, segment_ids)
        return objective.row_nats(logits, x_0, noised).bound

    mesh = sharding.make_mesh(config.eval.batch_size)
    params = jax.device_put(params, sharding.replicated(mesh))
    key = jax.random.key(config.eval.seed)
    nats = np.zeros(len(rows))
    for repeat in range(config.eval.repeats):
        done = 0
        for batch in _batches(rows, config.eval.batch_size):
            # A short last batch is filled up by repeating its rows; the copies' results are not used.
            filled = np.resize(np.stack(batch), (config.eval.batch_size, len(batch[0])))
            noise = jax.random.fold_in(jax.random.fold_in(key, repeat), done)
            scored = nats_per_row(params, sharding.put_rows(mesh, filled), noise)
            nats[done : done + len(batch)] += np.asarray(scored)[: len(batch)] / config.eval.repeats
            done += len(batch)
            if done // config.eval.batch_size % 20 == 0 or done == len(rows):
                emit("progress", done=done + repeat * len(rows), total=len(rows) * config.eval.repeats, unit="rows")
    tokens = np.concatenate(rows)
    n_bytes = int(np.array(tokenizer.token_bytes(encoding))[tokens].sum())
    stderr = float(nats.std(ddof=1)) * math.sqrt(len(rows))
    metrics = {
        "val_nats_per_token": float(nats.sum()) / len(tokens),
        "val_nats_per_token_stderr": stderr / len(tokens),
        "val_bits_per_byte": bits_per_byte(float(nats.sum()), n_bytes),
        "val_bits_per_byte_stderr": bits_per_byte(stderr, n_bytes),
        "val_unigram_nats_per_token": unigram_nats(tokens),
        "val_unigram_bits_per_byte": bits_per_byte(unigram_nats(tokens) * len(tokens), n_bytes),
        "scored_tokens": len(tokens),
        "scored_bytes": n_bytes,
        "scored_rows": len(rows),
    }
    (attempt.path / "metrics.json").write_text(json.dumps(metrics, indent=1))
    return metrics


def _batches(rows: list[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    """Batches of rows of equal length; the validation's short last row comes alone."""
    whole = [row for row in rows if len(row) == len(rows[0])]
    for i in range(0, len(whole), size):
        yield whole[i : i + size]
    if len(whole) < len(rows):
        yield rows[len(whole) :]
