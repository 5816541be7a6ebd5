"""Exact likelihoods in an order: tokens told one after another, each with its probability given those told before.

The NELBO of masks is the mean of -log p over uniformly random orders (Uria et al., arXiv:1310.1757, section 3;
Hoogeboom et al., arXiv:2110.02037, section 2). Blocks come one after another, each in a random order of its own; left
to right there is one order, and the bound is -log p itself.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from nanodlm.diffusion.corruption import Corruption
from nanodlm.errors import Emit, UsageError, silent
from nanodlm.evaluation.scoring import make_scorer
from nanodlm.model.transformer import Transformer, segments

AT_ONCE = 8192  # tokens in the rows of one call of the network
SAME = {"xla_gpu_autotune_level": 0, "xla_gpu_exclude_nondeterministic_ops": True}  # or GPUs choose what is fast today

Tokens = Int[np.ndarray, "T"]
Order = Callable[[tuple[int, int]], Int[np.ndarray, "B L"]]  # of the positions of so many rows
# From places in the text, and the log-probabilities of what may stand there, (B, n, V), to the tokens that do.
Tell = Callable[[Int[np.ndarray, "B n"], Float[np.ndarray, "B n V"]], Int[np.ndarray, "B n"]]


def random_order(network: Transformer, seed: int) -> Order:
    """Return what draws an order for each row: uniformly random within a block, of blocks from left to right."""
    rng, size = np.random.default_rng(seed), _block(network)
    return lambda shape: np.argsort(np.arange(shape[1]) // (size or shape[1]) + rng.random(shape), axis=1)


def walk(
    network: Transformer, n_tokens: int, tell: Tell, order: Order | None, *, group: int = 1, emit: Emit = silent
) -> tuple[Tokens, Float[np.ndarray, "T"]]:
    """Go through the rows of a text in an order, being told its tokens; return them, and the -log p of each in nats.

    All rows of a batch go in step, a `group` of tokens at a time, of which none knows the others. Without an order, the
    next token of a row is the one that is surest, given those told before. In groups of one, a row's sum is its exact
    -log p, by the chain rule. Random tokens as noise have no such conditionals, and are a UsageError.
    """
    if network.objective.mixed:
        why = f"{network.objective.kind} noise never says which tokens are known"
        raise UsageError(f"{why}: certify takes absorbing, block and autoregressive models")
    ask, params = _make_ask(network), nnx.state(network)
    tokens, nats = np.full(n_tokens, network.objective.mask_id, np.int32), np.zeros(n_tokens)
    for start, (n_rows, length) in batches(n_tokens, network.seq_len):
        x = tokens[start : start + n_rows * length].reshape(n_rows, length)  # a view
        orders, row = order and order(x.shape), start + np.arange(0, x.size, length)[:, None]
        size = _block(network) or length
        for first in range(0, length, size):
            last = min(first + size, length)
            everywhere = np.tile(np.arange(first, last), (n_rows, 1))
            for step in range(first, last, group):
                next_ = everywhere if orders is None else orders[:, step : min(step + group, last)]
                rate = np.float32((last - step) / (last - first))
                next_, logits = map(np.asarray, ask(params, x, rate, next_, surest=orders is None))
                logits = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
                log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
                tokens[row + next_] = told = tell(row + next_, log_p)
                nats[row + next_] = -np.take_along_axis(log_p, told[..., None], axis=2)[..., 0]
                emit("progress", done=start + n_rows * min(step + group, last), total=n_tokens, unit="tokens")
    return tokens, nats


def bound_nats(network: Transformer, tokens: Tokens, *, group: int, draws: int, seed: int) -> Float[np.ndarray, "N"]:
    """Return the bound of each row of a text, the mean of so many draws of noise, for tokens that are told by group."""
    scorer, params, nats = make_scorer(network, group), nnx.state(network), []
    for start, shape in batches(len(tokens), network.seq_len):
        rows = jnp.asarray(tokens[start : start + math.prod(shape)].reshape(shape), jnp.int32)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), start), draws)
        scored = [scorer(params, rows, np.zeros(len(rows), int), key).nats for key in keys]
        nats.append(np.mean(scored, axis=0, dtype=np.float64).sum(axis=1))
    return np.concatenate(nats)


def batches(n_tokens: int, length: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yield the start and the shape of rows that are told together; the last row may be shorter, and is alone.

    >>> list(batches(10, 4))
    [(0, (2, 4)), (8, (1, 2))]
    """
    start = 0
    while start < n_tokens:
        n_rows = min(max(1, AT_ONCE // length), (n_tokens - start) // length)
        yield start, (shape := (n_rows, length) if n_rows else (1, n_tokens - start))
        start += math.prod(shape)


def _block(network: Transformer) -> int:
    return network.objective.traits.block_size(network.objective.block_size)


def _make_ask(network: Transformer) -> Any:
    """Return a function of (parameters, rows, rate, places, surest): places, and the logits there, (B, n, V).

    Of each row's block a share, the `rate`, is masked. The `surest` one of the masked places is returned alone.
    """
    graphdef, objective = nnx.graphdef(network), network.objective
    kind, end = objective.traits, network.document_end

    @partial(jax.jit, static_argnames="surest", compiler_options=SAME)
    def ask(params: Any, x: Int[Array, "B L"], rate: Float[Array, ""], places: Int[Array, "B n"], surest: bool) -> Any:
        model, t = nnx.merge(graphdef, params), objective.schedule.time_of(rate)
        segment_ids = segments(x, end) if kind.edges_known and end is not None else None
        if kind.reads == "before":
            noised = objective.corrupt(x, jax.random.key(0), segment_ids)
        else:
            t = jnp.full((len(x), -(-x.shape[1] // objective.block_size))[: 1 + (kind.reads == "block")], t)
            noised = Corruption(x, t, t, t, t)  # of which a network reads no more
        features = jnp.take_along_axis(objective.logits(model.features, x, noised, segment_ids), places[..., None], 1)
        table = model.table[: objective.mask_id].astype(features.dtype)
        logits = jnp.einsum("bnd,vd->bnv", features, table, preferred_element_type=jnp.float32)
        if surest:
            masked = jnp.take_along_axis(x, places, 1) == objective.mask_id
            best = jnp.where(masked, jax.nn.log_softmax(logits).max(axis=-1), -jnp.inf).argmax(axis=1)[:, None]
            places, logits = jnp.take_along_axis(places, best, 1), jnp.take_along_axis(logits, best[..., None], 1)
        return places, logits

    return ask
