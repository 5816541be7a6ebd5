"""The bound of rows under a model: what evaluation reports, and what ranks checkpoints while training."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from nanodlm.devices.mesh import batch_sharding, constrain, logit_chunks
from nanodlm.model.transformer import Transformer, segments

Scorer = Callable[[Any, Int[Array, "B L"], Key[Array, ""]], Float[Array, "B"]]


def make_scorer(network: Transformer, group: int = 1) -> Scorer:
    """Return a function of (parameters, rows, key): the bound of each row in nats, whatever weights were trained on.

    Noise takes the count form, which has the least variance and no schedule in it; the autoregressive likelihood has no
    noise. A network that was told in training where documents end is told so from left to right only, where a mark that
    was read ends a document. Edges would tell others where masked end-of-text marks are. With a `group` it is the bound
    for telling so many tokens at once, none of which knows the others.
    """
    graphdef, objective = nnx.graphdef(network), network.objective
    document_end = network.document_end if objective.traits.edges_known else None
    objective = replace(objective, estimator="count", times="systematic", weighting="bound", group=group)

    @jax.jit
    def nats_per_row(params: Any, x_0: Int[Array, "B L"], key: Key[Array, ""]) -> Float[Array, "B"]:
        segment_ids = None if document_end is None else segments(x_0, document_end)
        noised = objective.corrupt(x_0, key, segment_ids)
        model = nnx.merge(graphdef, params)
        if objective.mixed:
            bound = objective.row_nats(objective.logits(model, x_0, noised, segment_ids), x_0, noised).bound
        else:
            chunks = logit_chunks(x_0.size, objective.mask_id)
            features = objective.logits(model.features, x_0, noised, segment_ids)
            bound = objective.fused_nats(features, model.table, x_0, noised, chunks=chunks)[1].sum(axis=1)
        return constrain(bound, None)  # on all devices, so that every process can read it

    return nats_per_row


def score_rows(
    scorer: Scorer, params: Any, rows: list[np.ndarray], key: Key[Array, ""], *, mesh: Mesh, batch_size: int
) -> Iterator[Float[np.ndarray, "B"]]:
    """Yield the nats of each row, a batch at a time: equal keys give equal noise.

    All rows are of one length but for the last, which may be shorter and then is a batch of its own.
    """
    whole = len(rows) - (len(rows[-1]) != len(rows[0]))
    starts = [*range(0, whole, batch_size), *range(whole, len(rows))]
    for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        # A short batch is filled up by repeating its rows; the copies' results are not used.
        filled = np.resize(np.stack(rows[start:end]), (batch_size, len(rows[start])))
        sent = jax.make_array_from_callback(filled.shape, batch_sharding(mesh), filled.__getitem__)
        scored = scorer(params, sent, jax.random.fold_in(key, start))
        yield np.asarray(scored)[: end - start]
