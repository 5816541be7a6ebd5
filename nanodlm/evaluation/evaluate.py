"""The evaluate stage: the bound on held-out text, with its standard error, beside the unigram entropy."""

import json
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tiktoken
from flax import nnx
from jaxtyping import Int

from nanodlm.build import make_objective
from nanodlm.checkpoints.loading import load_artifact
from nanodlm.config import Config, EvalConfig, load_config
from nanodlm.data.rows import read
from nanodlm.data.tokenizer import token_bytes
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.devices.mesh import make_mesh, replicated
from nanodlm.diffusion.objective import Objective
from nanodlm.errors import NanodlmError
from nanodlm.evaluation.scoring import make_scorer, score_rows
from nanodlm.model.transformer import Transformer
from nanodlm.store import Artifact, Attempt

Emit = Callable[..., None]


def unigram_nats(tokens: Int[np.ndarray, "N"]) -> float:
    """Return the entropy of the tokens' own frequencies, in nats per token: the best that a model without context gets.

    >>> round(unigram_nats(np.array([0, 1, 0, 1])), 4)
    0.6931
    """
    counts = np.bincount(tokens)
    p = counts[counts > 0] / len(tokens)
    return float(-(p * np.log(p)).sum())


def evaluate(config: Config, inputs: dict[str, Artifact], attempt: Attempt, emit: Emit) -> dict[str, Any]:
    """Stage: `score` the validation rows with the bound of the objective they were trained on; write `metrics.json`."""
    model, encoding = load_artifact(inputs["train"])
    trained = load_config(str(inputs["train"].file("config.json")))
    shard = inputs["shard"]
    rows = read(shard.file("validation.arrayrecord"), shard.metrics["dtype"])[: config.eval.max_rows]
    objective = make_objective(trained, Vocabulary.of(encoding))
    metrics = score(model, encoding, rows, objective, config.eval, edges_known=trained.edges_known, emit=emit)
    (attempt.path / "metrics.json").write_text(json.dumps(metrics, indent=1))
    return metrics


def score(
    model: Transformer,
    encoding: tiktoken.Encoding,
    rows: list[np.ndarray],
    objective: Objective,
    options: EvalConfig,
    *,
    edges_known: bool = False,
    emit: Emit = lambda *_, **__: None,
) -> dict[str, Any]:
    """Return the bound of rows, whatever the network was trained to minimise (see diffusion/objective.py).

    Rows are of equal length but for the last, which may be shorter. Every row is scored by itself: its bound is on
    -log p of its tokens without the text before it. Each row gets `repeats` draws of noise. The standard error is that
    of the mean over rows taken as independent: it covers the noise and the choice of rows, not that rows of one
    document resemble each other. With `edges_known` the network is told where documents end.

    Raises:
        NanodlmError: When there are fewer than two rows, which have no standard error.

    Returns:
        `val_nats_per_token`, `val_bits_per_byte`, `val_bits_per_byte_stderr`, `val_unigram_bits_per_byte` and counts.
        Bits per byte divide by the bytes of the text; end-of-text marks add nats but no bytes.
    """
    if len(rows) < 2:
        raise NanodlmError("one validation row has no standard error: raise --data.val_tokens or lower --model.seq_len")
    graphdef, params = nnx.split(model)
    scorer = make_scorer(objective, graphdef, document_end=encoding.eot_token if edges_known else None)
    mesh = make_mesh(options.batch_size)
    params = jax.device_put(params, replicated(mesh))
    nats = np.zeros(len(rows))
    for repeat in range(options.repeats):
        done = 0
        noise = jax.random.fold_in(jax.random.key(options.seed), repeat)
        for scored in score_rows(scorer, params, rows, noise, mesh=mesh, batch_size=options.batch_size):
            nats[done : done + len(scored)] += scored / options.repeats
            done += len(scored)
            if done // options.batch_size % 20 == 0 or done == len(rows):
                emit("progress", done=done + repeat * len(rows), total=len(rows) * options.repeats, unit="rows")
    tokens = np.concatenate(rows)
    n_bytes = int(np.array(token_bytes(encoding))[tokens].sum())
    stderr = float(nats.std(ddof=1)) * math.sqrt(len(rows))  # of the sum
    return {
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


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Convert the total nats of a text of so many bytes to bits per byte.

    >>> bits_per_byte(math.log(2) * 8, 4)
    2.0
    """
    return nats / math.log(2) / n_bytes
