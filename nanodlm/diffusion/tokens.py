"""Drawing tokens from logits: the start of a sequence, temperature, top-k, nucleus, Gumbel-max."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from nanodlm.diffusion.noise import Logits, Tokens

TINY = 1e-30
Prompt = Int[Array, "B P"] | Int[Array, "P"] | None


def _require(sound: bool, message: str) -> None:
    if not sound:
        raise ValueError(message)


def _start(prompt: Prompt, shape: tuple[int, int], mask_id: int) -> Tokens:
    """Return the prompt with masks behind it."""
    x_1 = jnp.full(shape, mask_id, jnp.int32)
    if prompt is None:
        return x_1
    given = jnp.asarray(prompt)
    whole = jnp.issubdtype(given.dtype, jnp.integer) or given.size == 0
    _require(whole and given.ndim in (1, 2), "a prompt is one row of token ids, or as many as there are sequences")
    prompt = jnp.atleast_2d(given.astype(jnp.int32))
    fits = prompt.shape[1] <= shape[1] and prompt.shape[0] in (1, shape[0])
    _require(fits, f"a prompt of shape {prompt.shape} does not fit sequences of shape {shape}")
    return x_1.at[:, : prompt.shape[1]].set(prompt)


def limited(logits: Logits, temperature: float, top_k: int, top_p: float) -> Logits:
    """Sharpen logits, then cut them to the k best, then to the nucleus: what is left is what tokens are drawn from.

    Source of the nucleus: arXiv:1904.09751, section 3.1.

    >>> jax.nn.softmax(limited(jnp.log(jnp.array([[[0.2, 0.5, 0.3]]])), 1.0, 0, 0.6))[0, 0].tolist()  # 0.5 < 0.6
    [0.0, 0.625, 0.375]
    """
    _require(temperature >= 0, f"temperature must not be negative, not {temperature}")
    _require(top_k >= 0, f"top_k must not be negative, not {top_k}: choose 0 for all tokens")
    _require(0 < top_p <= 1, f"top_p must be above 0 and at most 1, not {top_p}: choose 1 for all tokens")
    if temperature == 0:
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(logits.shape[-1]) == best, 0.0, -jnp.inf)
    logits = (logits - logits.max(axis=-1, keepdims=True)) / temperature
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
    lower temperature (arXiv:2409.02908, on inaccurate categorical sampling).
    """
    rows = jnp.arange(len(logits))
    keys = jax.vmap(partial(jax.random.fold_in, key))(step * len(rows) + rows)
    return jax.vmap(partial(jax.random.categorical, mode="high"))(keys, logits).astype(jnp.int32)
