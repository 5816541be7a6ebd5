"""Drawing tokens from logits: the start of a sequence, temperature, top-k, nucleus, Gumbel-max."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from nanodlm.diffusion.checks import Rows, require, require_whole, token_ids
from nanodlm.diffusion.noise import Logits, Tokens


def _start(prompt: Rows | None, shape: tuple[int, int], mask_id: int) -> Tokens:
    """Return the prompt with masks behind it."""
    x_1 = jnp.full(shape, mask_id, jnp.int32)
    if prompt is None:
        return x_1
    given = jnp.atleast_2d(token_ids("the prompt", prompt, mask_id))
    fits = given.shape[1] <= shape[1] and given.shape[0] in (1, shape[0])
    require(fits, f"a prompt of shape {given.shape} does not fit sequences of shape {shape}")
    return x_1.at[:, : given.shape[1]].set(jnp.where(given > mask_id, -1, given))  # which ends a row, when traced


def limited(logits: Logits, temperature: float, top_k: int, top_p: float) -> Logits:
    """Sharpen logits, then cut them to the k best, then to the nucleus: what is left is what tokens are drawn from.

    Source of the nucleus: arXiv:1904.09751, section 3.1.

    >>> jax.nn.softmax(limited(jnp.log(jnp.array([[[0.2, 0.5, 0.3]]])), 1.0, 0, 0.6))[0, 0].tolist()  # 0.5 < 0.6
    [0.0, 0.625, 0.375]
    """
    require(0 <= temperature < math.inf, f"temperature must be finite and not negative, not {temperature}")
    require_whole("top_k", top_k, 0)
    require(0 < top_p <= 1, f"top_p must be above 0 and at most 1, not {top_p}: choose 1 for all tokens")
    if temperature == 0:
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(logits.shape[-1]) == best, 0.0 * logits, -jnp.inf)  # what is not finite stays so
    below = logits - logits.max(axis=-1, keepdims=True)
    logits = jnp.where(below == 0, 0.0, below / temperature)  # which may be 0 in the type of the logits
    if top_k == 0 and top_p == 1:
        return logits
    order = jnp.argsort(-logits, axis=-1)
    falling = jnp.take_along_axis(logits, order, axis=-1)
    if top_k > 0:
        falling = jnp.where(jnp.arange(logits.shape[-1]) < top_k, falling, -jnp.inf)
    if top_p < 1:
        p = jax.nn.softmax(falling, axis=-1)
        falling = jnp.where(jnp.cumsum(p, axis=-1) - p < top_p, falling, -jnp.inf)
    return jnp.put_along_axis(logits, order, falling, axis=-1, inplace=False)


def _categorical(key: Key[Array, ""], step: Int[Array, "B"] | Int[Array, ""], logits: Logits) -> Tokens:
    """Draw by Gumbel-max, with noise of each row and its step, so that rows need not be at the same step.

    The noise is of high precision: that of one 32-bit number stops at 16, which starves rare tokens and acts as a
    lower temperature (arXiv:2409.02908, on inaccurate categorical sampling). Where logits are NaN or plus infinity, or
    all minus infinity, nothing can be drawn, and the token is -1.
    """
    rows = jnp.arange(len(logits))
    keys = jax.vmap(partial(jax.random.fold_in, key))(step * len(rows) + rows)
    drawn = jax.vmap(partial(jax.random.categorical, mode="high"))(keys, logits).astype(jnp.int32)
    return jnp.where(jnp.isfinite(logits.max(axis=-1)), drawn, -1)


def probability(logits: Logits, tokens: Tokens) -> Float[Array, "B L"]:
    """Return what the softmax of logits gives tokens, of which -1 stands for none.

    >>> probability(jnp.zeros((1, 2, 4)), jnp.array([[1, 3]])).tolist()
    [[0.25, 0.25]]
    """
    p = jax.nn.softmax(logits, axis=-1)
    return jnp.take_along_axis(p, jnp.maximum(tokens, 0)[..., None], axis=-1)[..., 0].astype(jnp.float32)
