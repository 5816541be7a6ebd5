"""The evaluate stage: the bound on held-out text, with its standard error, beside the unigram entropy."""

import json
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Int

from nanodlm import sharding, shards, tokenizer
from nanodlm.checkpoint import load_folder
from nanodlm.config import Config, load_config
from nanodlm.errors import NanodlmError
from nanodlm.metrics import bits_per_byte
from nanodlm.scoring import make_scorer, score
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
    graphdef, params = nnx.split(model)
    scorer = make_scorer(trained, encoding, graphdef)
    mesh = sharding.make_mesh(config.eval.batch_size)
    params = jax.device_put(params, sharding.replicated(mesh))
    key = jax.random.key(config.eval.seed)
    nats = np.zeros(len(rows))
    for repeat in range(config.eval.repeats):
        done = 0
        noise = jax.random.fold_in(key, repeat)
        for scored in score(scorer, params, rows, noise, mesh=mesh, batch_size=config.eval.batch_size):
            nats[done : done + len(scored)] += scored / config.eval.repeats
            done += len(scored)
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
