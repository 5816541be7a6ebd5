"""The absorbing (masked) diffusion process: how tokens are masked, and how a step back unmasks them.

A token of x_0 is replaced by `mask_id` by time t with probability 1 - alpha(t), independently of the
others, and never changes back. Source: D3PM, arXiv:2107.03006, section 3.1 (absorbing state).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from nanodlm.schedules import Schedule


def low_discrepancy(key: Key[Array, ""], n: int) -> Float[Array, "n"]:
    """N uniform numbers in (0, 1], one in each interval of length 1/n, sharing one random offset.

    Each is uniform by itself, so averages stay unbiased; together they cover the interval evenly, which
    lowers the variance. Source: Variational Diffusion Models, arXiv:2107.00630, appendix I.1.

    >>> jnp.floor(low_discrepancy(jax.random.key(0), 4) * 4 - 1e-3).astype(int).tolist().__len__()
    4
    """
    return 1.0 - (jax.random.uniform(key) + jnp.arange(n) / n) % 1.0


def q_sample(
    x_0: Int[Array, "B L"], mask_rate: Float[Array, "B"], key: Key[Array, ""], *, mask_id: int
) -> Int[Array, "B L"]:
    """Sample x_t from q(x_t | x_0): each token is masked with its row's probability.

    Args:
        x_0: Token ids.
        mask_rate: 1 - alpha(t) of each row, in [0, 1].
        key: Randomness.
        mask_id: The id that stands for a masked token.

    >>> q_sample(jnp.array([[5, 6, 7]]), jnp.array([1.0]), jax.random.key(0), mask_id=9).tolist()
    [[9, 9, 9]]
    """
    masked = jax.random.uniform(key, x_0.shape) < mask_rate[:, None]
    return jnp.where(masked, mask_id, x_0)


def mask_subset(
    x_0: Int[Array, "B L"], count: Int[Array, "B"], key: Key[Array, ""], *, mask_id: int
) -> Int[Array, "B L"]:
    """Mask a uniformly random subset of exactly `count` positions of each row.

    >>> x = mask_subset(jnp.zeros((2, 8), int), jnp.array([3, 8]), jax.random.key(0), mask_id=1)
    >>> x.sum(axis=1).tolist()
    [3, 8]
    """
    noise = jax.random.uniform(key, x_0.shape)
    rank = jnp.argsort(jnp.argsort(noise, axis=1), axis=1)  # a uniformly random permutation of each row
    return jnp.where(rank < count[:, None], mask_id, x_0)


def unmask_probability(schedule: Schedule, t: Float[Array, "..."], s: Float[Array, "..."]) -> Float[Array, "..."]:
    """Probability (alpha_s - alpha_t) / (1 - alpha_t) that a token masked at t is unmasked at s < t.

    It is exactly 1 at s = 0. Source: MDLM, arXiv:2406.07524, equation 7.

    >>> from nanodlm.schedules import make_schedule
    >>> float(unmask_probability(make_schedule("linear"), jnp.float32(0.5), jnp.float32(0.25)))
    0.5
    """
    masked_s, masked_t = schedule.mask_rate(s), schedule.mask_rate(t)
    # The rates of a steep schedule underflow to 0 while t and s are not.
    return 1.0 - jnp.where(masked_s > 0, masked_s / masked_t, 0.0)


def predictable(logits: Float[Array, "... V"], *, mask_id: int) -> Float[Array, "... V"]:
    """Logits in float32 with the ids that are never predicted (mask and padding) at minus infinity.

    >>> predictable(jnp.zeros((1, 4)), mask_id=2).tolist()
    [[0.0, 0.0, -inf, -inf]]
    """
    real: Bool[Array, V] = jnp.arange(logits.shape[-1]) < mask_id
    return jnp.where(real, logits.astype(jnp.float32), -jnp.inf)
