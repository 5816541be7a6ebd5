"""Drawing tokens from logits: the start of a sequence, temperature, top-k, nucleus, Gumbel-max."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from nanodlm.diffusion.checks import Rows, require, require_whole, token_ids
from nanodlm.diffusion.noise import Tokens

Scores = Float[Array, "*N V"]  # logits at any places


def _start(prompt: Rows | None, shape: tuple[int, int], mask_id: int) -> Tokens:
    """Return the prompt with masks behind it."""
    x_1 = jnp.full(shape, mask_id, jnp.int32)
    if prompt is None:
        return x_1
    given = jnp.atleast_2d(token_ids("the prompt", prompt, mask_id))
    fits = given.shape[1] <= shape[1] and given.shape[0] in (1, shape[0])
    require(fits, f"a prompt of shape {given.shape} does not fit sequences of shape {shape}")
    return x_1.at[:, : given.shape[1]].set(jnp.where(given > mask_id, -1, given))  # which ends a row, when traced


def limited(logits: Scores, temperature: float, top_k: int, top_p: float) -> Scores:
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


def _categorical(
    key: Key[Array, ""], step: Int[Array, "N"] | Int[Array, ""], place: Int[Array, "N"], logits: Float[Array, "N V"]
) -> Int[Array, "N"]:
    """Draw a token at each place by Gumbel-max twice: first one of sqrt(V) parts of the ids, then one in that part.

    That is the law of Gumbel-max over all ids with a sqrt(V)-th of the noise, which belongs to a place and its step.
    It is of high precision: that of one 32-bit number stops at 16, which starves rare tokens and acts as a lower
    temperature (arXiv:2409.02908, on inaccurate categorical sampling). Where logits are NaN or plus infinity, or all
    minus infinity, nothing can be drawn, and the token is -1.
    """
    size = math.isqrt(logits.shape[-1])
    parts = jnp.pad(logits, ((0, 0), (0, -logits.shape[-1] % size)), constant_values=-jnp.inf)

    def one(step: Int[Array, ""], place: Int[Array, ""], parts: Float[Array, "P S"]) -> Int[Array, ""]:
        keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, step), place))
        part = jax.random.categorical(keys[0], jax.nn.logsumexp(parts, axis=-1), mode="high")
        return part * size + jax.random.categorical(keys[1], parts[part], mode="high")

    drawn = jax.vmap(one)(jnp.broadcast_to(step, place.shape), place, parts.reshape(len(logits), -1, size))
    return jnp.where(jnp.isfinite(logits.max(axis=-1)), drawn, -1).astype(jnp.int32)


def probability(logits: Scores, tokens: Int[Array, "*N"]) -> Float[Array, "*N"]:
    """Return what the softmax of logits gives tokens, of which -1 stands for none.

    >>> probability(jnp.zeros((1, 2, 4)), jnp.array([[1, 3]])).tolist()
    [[0.25, 0.25]]
    """
    p = jax.nn.softmax(logits, axis=-1)
    return jnp.take_along_axis(p, jnp.maximum(tokens, 0)[..., None], axis=-1)[..., 0].astype(jnp.float32)
