"""The negative evidence lower bound (NELBO) of masked diffusion, in three estimators of one number.

For a model that predicts the distribution of each masked token, the bound is an average of weighted
cross-entropies over masked positions. `corrupt` draws the noise and the weight, `nelbo` puts them together:

    estimator    noise                                         weight of the row's summed cross-entropy
    continuous   t ~ U(0, 1], each token masked at 1-alpha_t   -alpha'_t / (1 - alpha_t)
    discrete     t ~ U{1/T .. 1}, likewise                     T (alpha_s - alpha_t) / (1 - alpha_t), s = t - 1/T
    count        n ~ U{1 .. L}, a uniform n-subset masked      L / n

The first and the last have the same expectation under every schedule; the discrete one is larger and falls
to it as T grows.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from nanodlm.diffusion import low_discrepancy, mask_subset, predictable, q_sample, unmask_probability
from nanodlm.schedules import Schedule

Denoise = Callable[[Int[Array, "B L"], Float[Array, "B"]], Float[Array, "B L V"]]
Estimator = Literal["continuous", "discrete", "count"]


class Corruption(NamedTuple):
    """Noised rows: `x_t`, their times `t` in (0, 1], and the weight that makes the bound unbiased."""

    x_t: Int[Array, "B L"]
    t: Float[Array, "B"]
    weight: Float[Array, "B"]


def corrupt(
    x_0: Int[Array, "B L"],
    key: Key[Array, ""],
    *,
    schedule: Schedule,
    mask_id: int,
    estimator: Estimator = "continuous",
    num_timesteps: int = 1000,
) -> Corruption:
    """Draw noise for a batch, with times (or counts) of low discrepancy across all its rows.

    Args:
        x_0: Token ids, all below `mask_id`.
        key: Randomness.
        schedule: The masking schedule; `count` uses it only to tell the network the time.
        mask_id: The id of a masked token.
        estimator: Which estimator of the bound; see the module's table.
        num_timesteps: T of the discrete estimator.

    Raises:
        ValueError: For an unknown estimator.

    Source: MD4, arXiv:2406.04329, equations 4 (continuous) and 6 (discrete); LLaDA, arXiv:2502.09992,
    equation 6, and RADD, arXiv:2406.03736, appendix C (count).

    >>> from nanodlm.schedules import make_schedule
    >>> c = corrupt(jnp.zeros((4, 8), int), jax.random.key(0), schedule=make_schedule("linear"), mask_id=1,
    ...             estimator="count")
    >>> bool(jnp.allclose(c.weight * (c.x_t == 1).sum(1), 8.0))
    True
    """
    n_rows, length = x_0.shape
    time_key, mask_key = jax.random.split(key)
    u = low_discrepancy(time_key, n_rows)
    if estimator == "count":
        count = jnp.clip(jnp.ceil(u * length).astype(jnp.int32), 1, length)
        x_t = mask_subset(x_0, count, mask_key, mask_id=mask_id)
        return Corruption(x_t, schedule.time_of(count / length), length / count)
    if estimator == "continuous":
        t = u
        weight = schedule.weight(t)
    elif estimator == "discrete":
        step = jnp.clip(jnp.ceil(u * num_timesteps), 1, num_timesteps)
        t, s = step / num_timesteps, (step - 1) / num_timesteps
        weight = num_timesteps * unmask_probability(schedule, t, s)
    else:
        raise ValueError(f"unknown estimator {estimator!r}: choose continuous, discrete or count")
    return Corruption(q_sample(x_0, schedule.mask_rate(t), mask_key, mask_id=mask_id), t, weight)


def masked_cross_entropy(
    logits: Float[Array, "B L V"], x_0: Int[Array, "B L"], x_t: Int[Array, "B L"], *, mask_id: int
) -> Float[Array, "B"]:
    """Sum over a row's masked positions of -log p(x_0 | x_t), in nats, from a float32 log-softmax.

    Ids from `mask_id` on have probability 0 (zero masking probabilities, MDLM, arXiv:2406.07524, section 3.2.3).

    >>> ce = masked_cross_entropy(jnp.zeros((1, 2, 3)), jnp.array([[0, 1]]), jnp.array([[2, 1]]), mask_id=2)
    >>> round(float(ce[0]), 4)  # one masked position, two possible tokens: log 2
    0.6931
    """
    logits = predictable(logits, mask_id=mask_id)
    true_logit = jnp.take_along_axis(logits, x_0[..., None], axis=-1)[..., 0]
    nats = jax.nn.logsumexp(logits, axis=-1) - true_logit
    return jnp.where(x_t == mask_id, nats, 0.0).sum(axis=-1)


def nelbo(
    denoise: Denoise,
    x_0: Int[Array, "B L"],
    key: Key[Array, ""],
    *,
    schedule: Schedule,
    mask_id: int,
    estimator: Estimator = "continuous",
    num_timesteps: int = 1000,
) -> Float[Array, "B"]:
    """One unbiased estimate per row of the bound on -log p(x_0), in nats per sequence.

    Args:
        denoise: Maps x_t (B, L) and t (B,) to logits (B, L, V), V > mask_id.
        x_0: Token ids, all below `mask_id`.
        key: Randomness.
        schedule: The masking schedule.
        mask_id: The id of a masked token; it and larger ids are never predicted.
        estimator: `continuous`, `discrete` or `count`.
        num_timesteps: T of the discrete estimator.

    Returns:
        Nats per sequence, (B,). Divide the mean by L for nats per token.

    >>> from nanodlm.schedules import make_schedule
    >>> uniform = lambda x_t, t: jnp.zeros((*x_t.shape, 3))
    >>> nats = nelbo(uniform, jnp.zeros((4, 8), int), jax.random.key(0), schedule=make_schedule("linear"),
    ...              mask_id=2, estimator="count")
    >>> [round(float(v), 3) for v in nats]  # 8 log 2
    [5.545, 5.545, 5.545, 5.545]
    """
    noised = corrupt(x_0, key, schedule=schedule, mask_id=mask_id, estimator=estimator, num_timesteps=num_timesteps)
    nats = masked_cross_entropy(denoise(noised.x_t, noised.t), x_0, noised.x_t, mask_id=mask_id)
    return noised.weight * nats
