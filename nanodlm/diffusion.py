"""The noising processes: how tokens are masked or replaced, and what a step back does.

Absorbing: a token of x_0 is replaced by `mask_id` by time t with probability 1 - alpha(t), independently of the
others, and never changes back. Source: D3PM, arXiv:2107.03006, section 3.1 (absorbing state).

Mixed: noise also replaces tokens by uniformly random ones; `shares` says how much of which. Source: GIDD,
arXiv:2503.04482, section 3.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from nanodlm.schedules import Schedule

Times = Literal["independent", "stratified", "systematic"]


def low_discrepancy(key: Key[Array, ""], n: int, times: Times = "systematic") -> Float[Array, "n"]:
    """N numbers in (0, 1], each uniform by itself, one in each interval of length 1/n.

    Averages over them stay unbiased, and since together they cover the interval evenly, their variance is lower.

    Args:
        key: Randomness.
        n: How many.
        times: `systematic` shares one random offset (Variational Diffusion Models, arXiv:2107.00630, appendix I.1);
            `stratified` draws one for each interval; `independent` draws n numbers without intervals.

    >>> sorted(jnp.ceil(low_discrepancy(jax.random.key(0), 4, "stratified") * 4).astype(int).tolist())
    [1, 2, 3, 4]
    """
    if times == "independent":
        return 1.0 - jax.random.uniform(key, (n,))
    if times == "stratified":
        return 1.0 - (jax.random.uniform(key, (n,)) + jnp.arange(n)) / n % 1.0
    return 1.0 - (jax.random.uniform(key) + jnp.arange(n) / n) % 1.0


def q_sample(
    x_0: Int[Array, "B L"], mask_rate: Float[Array, "B"], key: Key[Array, ""], *, mask_id: int
) -> Int[Array, "B L"]:
    """Sample x_t from the absorbing q(x_t | x_0): each token is masked with its row's probability.

    Args:
        x_0: Token ids; padding, ids from `mask_id` on, stays as it is.
        mask_rate: 1 - alpha(t) of each row, in [0, 1].
        key: Randomness.
        mask_id: The id that stands for a masked token.

    >>> q_sample(jnp.array([[5, 6, 10]]), jnp.array([1.0]), jax.random.key(0), mask_id=9).tolist()
    [[9, 9, 10]]
    """
    masked = jax.random.uniform(key, x_0.shape) < mask_rate[:, None]
    return jnp.where(masked & (x_0 < mask_id), mask_id, x_0)


def mask_subset(
    x_0: Int[Array, "B L"], count: Int[Array, "B"], key: Key[Array, ""], *, mask_id: int
) -> Int[Array, "B L"]:
    """Mask a uniformly random subset of exactly `count` of each row's tokens; padding is never among them.

    >>> x = mask_subset(jnp.zeros((2, 8), int), jnp.array([3, 8]), jax.random.key(0), mask_id=1)
    >>> x.sum(axis=1).tolist()
    [3, 8]
    """
    return jnp.where(_subset(x_0 < mask_id, count, key), mask_id, x_0)


def _subset(real: Bool[Array, "B L"], count: Int[Array, "B"], key: Key[Array, ""]) -> Bool[Array, "B L"]:
    """A uniformly random subset of `count` of each row's real positions."""
    noise = jnp.where(real, jax.random.uniform(key, real.shape), jnp.inf)
    rank = jnp.argsort(jnp.argsort(noise, axis=1), axis=1)  # a uniformly random permutation of each row's positions
    return rank < count[:, None]


def unmask_probability(schedule: Schedule, t: Float[Array, "..."], s: Float[Array, "..."]) -> Float[Array, "..."]:
    """Probability (alpha_s - alpha_t) / (1 - alpha_t) that a token masked at t is unmasked at s < t.

    All is masked at t = 1 and nothing at s = 0, also under schedules that jump there; so it is exactly 1 at s = 0.
    Source: MDLM, arXiv:2406.07524, equation 7.

    >>> from nanodlm.schedules import make_schedule
    >>> float(unmask_probability(make_schedule("linear"), jnp.float32(0.5), jnp.float32(0.25)))
    0.5
    """
    masked_s = jnp.where(s <= 0, 0.0, schedule.mask_rate(s))
    masked_t = jnp.where(t >= 1, 1.0, schedule.mask_rate(t))
    # The rates of a steep schedule underflow to 0 while t and s are not; flat, clipped ones change nothing.
    return 1.0 - jnp.where(masked_s > 0, masked_s / masked_t, 0.0)


class Shares(NamedTuple):
    """q(x_t | x_0) of a mixed process: the shares of the token itself, of the mask, and of uniform noise; sum 1."""

    kept: Float[Array, "..."]
    masked: Float[Array, "..."]
    uniform: Float[Array, "..."]


def shares(mask_rate: Float[Array, "..."], uniform_share: float) -> Shares:
    """How much of a token is left, masked, or uniformly random when m = 1 - alpha(t) of it is noise.

    Uniform share p = 1 is the uniform process: (1 - m, 0, m), ending in random tokens. Below it is the interpolation
    (1 - m, m, c) / (1 + c) with c = 2p/(1-p) sqrt(m (1 - m)), where uniform noise is p of all at m = 1/2 and both ends
    are those of masking. Sources: UDLM, arXiv:2412.10193, section 3; GIDD, arXiv:2503.04482, section 4, for m = t.

    Args:
        mask_rate: m, in [0, 1].
        uniform_share: p, in [0, 1]; 0 is masking alone.

    >>> [round(float(v), 3) for v in shares(jnp.float32(0.5), 0.2)]
    [0.4, 0.4, 0.2]
    """
    m = mask_rate
    if uniform_share == 1:
        return Shares(1 - m, jnp.zeros_like(m), m)
    c = 2 * uniform_share / (1 - uniform_share) * jnp.sqrt(m * (1 - m))
    return Shares((1 - m) / (1 + c), m / (1 + c), c / (1 + c))


def mask_rate_of(noise: Float[Array, "..."], uniform_share: float) -> Float[Array, "..."]:
    """The m at which a share `noise` < 1 of the tokens is noise of either sort: the inverse of 1 - shares(m, p).kept.

    With T = sqrt(m / (1 - m)) that equation is T^2 + c T = noise / (1 - noise), c = 2p/(1-p).

    >>> round(float(mask_rate_of(jnp.float32(0.6), 0.2)), 4)
    0.5
    """
    if uniform_share == 1:
        return noise
    c, odds = 2 * uniform_share / (1 - uniform_share), noise / (1 - noise)
    root = 2 * odds / (c + jnp.sqrt(c**2 + 4 * odds))
    return root**2 / (1 + root**2)


def q_sample_mixed(
    x_0: Int[Array, "B L"],
    at: Shares,
    key: Key[Array, ""],
    *,
    mask_id: int,
    count: Int[Array, "B"] | None = None,
) -> Int[Array, "B L"]:
    """Sample x_t from a mixed q(x_t | x_0); padding, ids from `mask_id` on, stays as it is.

    Args:
        x_0: Token ids.
        at: Each row's shares, (B,).
        key: Randomness.
        mask_id: The id of a masked token, and the number of real tokens that uniform noise draws from.
        count: When given, exactly so many positions of each row become noise, a uniformly random subset.

    >>> uniform_noise = Shares(*jnp.float32([[0], [0], [1]]))
    >>> bool((q_sample_mixed(jnp.array([[0, 1, 2]]), uniform_noise, jax.random.key(0), mask_id=3) < 3).all())
    True
    """
    where_key, which_key, token_key = jax.random.split(key, 3)
    share = at.masked + at.uniform
    real = x_0 < mask_id
    if count is None:
        is_noise = real & (jax.random.uniform(where_key, x_0.shape) < share[:, None])
    else:
        is_noise = _subset(real, count, where_key)
    is_mask = jax.random.uniform(which_key, x_0.shape) < (at.masked / jnp.maximum(share, 1e-30))[:, None]
    random = jax.random.randint(token_key, x_0.shape, 0, mask_id, x_0.dtype)
    return jnp.where(is_noise, jnp.where(is_mask, mask_id, random), x_0)


def predictable(logits: Float[Array, "... V"], *, mask_id: int) -> Float[Array, "... V"]:
    """Logits, at least in float32, with the ids that are never predicted (mask and padding) at minus infinity.

    Raises:
        ValueError: For fewer logits than real tokens.

    >>> predictable(jnp.zeros((1, 4)), mask_id=2).tolist()
    [[0.0, 0.0, -inf, -inf]]
    """
    if logits.shape[-1] < mask_id:
        raise ValueError(f"a network that scores {logits.shape[-1]} ids cannot have {mask_id} as its mask")
    real: Bool[Array, V] = jnp.arange(logits.shape[-1]) < mask_id
    return jnp.where(real, logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), -jnp.inf)
