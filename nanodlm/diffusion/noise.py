"""How tokens are masked, and what a step back does; noise that replaces them by random ones is in `mixed`.

Source of the absorbing process: D3PM, arXiv:2107.03006, section 3.1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from nanodlm.diffusion.kinds import Times
from nanodlm.diffusion.schedules import Schedule

Tokens = Int[Array, "B L"]
Logits = Float[Array, "B L V"]
TINY = 1e-30
Denoise = Callable[..., Logits]  # of x_t (B, L) and t (B,); for blocks t is (B, K)


def low_discrepancy(key: Key[Array, ""], n: int, times: Times = "systematic") -> Float[Array, "n"]:
    """Draw n numbers in (0, 1], each uniform by itself, one in each interval of length 1/n.

    Averages over them stay unbiased, and since together they cover the interval evenly, their variance is lower.

    Of the `times`, `systematic` shares one random offset (Variational Diffusion Models, arXiv:2107.00630, appendix
    I.1), `stratified` draws one for each interval, and `independent` draws n numbers without intervals.

    >>> sorted(jnp.ceil(low_discrepancy(jax.random.key(0), 4, "stratified") * 4).astype(int).tolist())
    [1, 2, 3, 4]
    """
    if times == "independent":
        return 1.0 - jax.random.uniform(key, (n,))
    if times == "stratified":
        return 1.0 - (jax.random.uniform(key, (n,)) + jnp.arange(n)) / n % 1.0
    return 1.0 - (jax.random.uniform(key) + jnp.arange(n) / n) % 1.0


def q_sample(x_0: Tokens, mask_rate: Float[Array, "B"], key: Key[Array, ""], *, mask_id: int) -> Tokens:
    """Sample x_t from the absorbing q(x_t | x_0): each token is masked with its row's rate; padding stays as it is.

    >>> q_sample(jnp.array([[5, 6, 10]]), jnp.array([1.0]), jax.random.key(0), mask_id=9).tolist()
    [[9, 9, 10]]
    """
    masked = jax.random.uniform(key, x_0.shape) < mask_rate[:, None]
    return jnp.where(masked & (x_0 < mask_id), mask_id, x_0)


def mask_subset(x_0: Tokens, count: Int[Array, "B"], key: Key[Array, ""], *, mask_id: int) -> Tokens:
    """Mask a uniformly random subset of exactly `count` of each row's tokens; padding is never among them."""
    return jnp.where(_subset(x_0 < mask_id, count, key), mask_id, x_0)


def _subset(real: Bool[Array, "B L"], count: Int[Array, "B"], key: Key[Array, ""]) -> Bool[Array, "B L"]:
    """Draw a uniformly random subset of `count` of each row's real positions."""
    return rank(jnp.where(real, jax.random.uniform(key, real.shape), jnp.inf)) < count[:, None]


def rank(x: Float[Array, "B L"]) -> Int[Array, "B L"]:
    """Return each entry's position in its sorted row, 0 for the smallest; equal ones count from left to right."""
    return jnp.argsort(jnp.argsort(x, axis=1), axis=1)  # the second sort inverts the permutation of the first


def unmask_probability(schedule: Schedule, t: Float[Array, "..."], s: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return the probability (alpha_s - alpha_t) / (1 - alpha_t) that a token masked at t is unmasked at s < t.

    All is masked at t = 1 and nothing at s = 0, also under schedules that jump there; so it is exactly 1 at s = 0.
    Source: MDLM, arXiv:2406.07524, equation 7.
    """
    masked_s = jnp.where(s <= 0, 0.0, schedule.mask_rate(s))
    masked_t = jnp.where(t >= 1, 1.0, schedule.mask_rate(t))
    # The rates of a steep schedule underflow to 0 while t and s are not; flat, clipped ones change nothing.
    return 1.0 - jnp.where(masked_s > 0, masked_s / masked_t, 0.0)


def remask_probability(
    sampler: str,
    remask: float,
    rates: tuple[Float[Array, ""], Float[Array, ""]],
    psi: Float[Array, "B L"],
    tokens: Bool[Array, "B L"],
) -> Float[Array, "B L"]:
    """Return ReMDM's sigma: the probability that a token is masked again from t to s, given the mask rates at both.

    With sigma_max = min(1, (1 - alpha_s) / alpha_t), above which more than 1 - alpha_s would be masked at s:

        remdm_cap, remdm_loop   min(remask, sigma_max)
        remdm_rescale           remask sigma_max
        remdm_conf              sigma_max softmax(-psi) over `tokens`, psi their probabilities when they were drawn

    Source: arXiv:2503.00307, section 4.
    """
    m_t, m_s = rates
    limit = jnp.where(m_s > 0, jnp.minimum(1.0, m_s / jnp.maximum(1 - m_t, TINY)), 0.0)
    if sampler == "remdm_conf":
        weight = jnp.where(tokens, jnp.exp(-psi), 0.0)
        return limit * weight / jnp.maximum(weight.sum(axis=1, keepdims=True), TINY)
    return jnp.full(psi.shape, remask * limit if sampler == "remdm_rescale" else jnp.minimum(remask, limit))
