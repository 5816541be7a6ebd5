"""The whole idea in its plainest form: masked diffusion with the linear schedule, for reading and for comparison.

`nelbo`, `Objective` and `sample` do the same with other noise and less work; tests hold that they agree with this.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from nanodlm.diffusion.noise import Denoise, Tokens


def plain_nelbo(denoise: Denoise, x_0: Tokens, key: Key[Array, ""], *, mask_id: int) -> Float[Array, "B"]:
    """Return one estimate per row of the bound on -log p(x_0), in nats per sequence.

        -log p(x_0) <= E[1/t sum over masked i of -log p(x_0[i] | x_t)],    t ~ U(0, 1], each token masked with chance t

    Source: MDLM, arXiv:2406.07524, equation 10, and MD4, arXiv:2406.04329, equation 4, both for alpha(t) = 1 - t.

    >>> guess = lambda x_t, t: jnp.zeros((*x_t.shape, 3))  # two tokens and the mask, all alike
    >>> plain_nelbo(guess, jnp.zeros((4, 8), int), jax.random.key(0), mask_id=2).shape
    (4,)
    """
    time_key, mask_key = jax.random.split(key)
    t = 1.0 - jax.random.uniform(time_key, (len(x_0),))  # (B,), in (0, 1]
    masked = jax.random.uniform(mask_key, x_0.shape) < t[:, None]  # (B, L)
    x_t = jnp.where(masked, mask_id, x_0)  # (B, L)
    logits = denoise(x_t, t)[..., :mask_id]  # (B, L, mask_id): the mask and padding are never predicted
    log_p = jax.nn.log_softmax(logits, axis=-1)
    nats = -jnp.take_along_axis(log_p, x_0[..., None], axis=-1)[..., 0]  # (B, L)
    return jnp.where(masked, nats, 0.0).sum(axis=1) / t


def plain_sample(
    denoise: Denoise, key: Key[Array, ""], *, shape: tuple[int, int], mask_id: int, num_steps: int
) -> Tokens:
    """Draw sequences by walking back from t = 1 to t = 0 in equal steps, starting from masks alone.

    From t to s each mask becomes a token with probability (t - s) / t, drawn from p(x_0 | x_t); tokens stay.
    Source: MDLM, arXiv:2406.07524, equation 7.

    >>> always_1 = lambda x_t, t: 50 * jax.nn.one_hot(jnp.ones_like(x_t), 3)
    >>> plain_sample(always_1, jax.random.key(0), shape=(1, 4), mask_id=2, num_steps=2).tolist()
    [[1, 1, 1, 1]]
    """

    def step(i: Int[Array, ""], x_t: Tokens) -> Tokens:
        t, s = 1.0 - i / num_steps, 1.0 - (i + 1) / num_steps
        unmask_key, token_key = jax.random.split(jax.random.fold_in(key, i))
        logits = denoise(x_t, jnp.full(shape[0], t))[..., :mask_id]  # (B, L, mask_id)
        tokens = jax.random.categorical(token_key, logits, mode="high")  # (B, L)
        unmask = jax.random.uniform(unmask_key, shape) < (t - s) / t  # (B, L); at s = 0 everywhere
        return jnp.where(unmask & (x_t == mask_id), tokens, x_t)

    return jax.lax.fori_loop(0, num_steps, step, jnp.full(shape, mask_id, jnp.int32))
