"""Noised rows: the times or counts that are drawn for them, and the weights that make the bound of them unbiased."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from nanodlm.diffusion.kinds import Estimator, Times
from nanodlm.diffusion.mixed import mask_rate_of, q_sample_mixed, shares
from nanodlm.diffusion.noise import Tokens, low_discrepancy, mask_subset, q_sample, unmask_probability
from nanodlm.diffusion.schedules import Schedule


class Corruption(NamedTuple):
    """Noised rows, and what makes the bound of them unbiased.

    All but the rows have shape (B,), or (B, K) when each of a row's K blocks has its own noise.
    """

    x_t: Tokens
    t: Float[Array, "B *K"]  # the time that the network is told, in [0, 1]
    mask_rate: Float[Array, "B *K"]  # m, how much is noise, in [0, 1]
    weight: Float[Array, "B *K"]  # of the bound, per unit of the times or counts drawn
    ratio: Float[Array, "B *K"]  # the part of it that makes up for counts drawn in other proportions, otherwise 1


def mask_rows(
    x_0: Tokens,
    key: Key[Array, ""],
    *,
    schedule: Schedule,
    mask_id: int,
    estimator: Estimator,
    times: Times,
    num_timesteps: int,
    group: int = 1,
) -> Corruption:
    """Mask rows; one that is all padding gets weight 0. The arguments are those of `Objective`.

    Counts are of masked tokens, at least one, and what is masked is weighed by L / count. Where a `group`
    of several is told at once, counts are rounded up to L, L - group and so on. The bound of that is larger.

    Sources: MD4, arXiv:2406.04329, equations 4 (continuous) and 6 (discrete); LLaDA, arXiv:2502.09992, equation 6, and
    RADD, arXiv:2406.03736, appendix C (count).
    """
    order_key, time_key, mask_key = jax.random.split(key, 3)
    u = jax.random.permutation(order_key, low_discrepancy(time_key, len(x_0), times))
    if estimator in ("count", "constant_count"):
        length = (x_0 < mask_id).sum(axis=1)
        count = jnp.ceil(u * length).astype(jnp.int32)
        if estimator == "constant_count":
            count = _paired_counts(length, order_key, time_key, times)
        count = jnp.clip(count, jnp.minimum(1, length), length)
        count = length - (length - count) // group * group
        mask_rate = count / jnp.maximum(length, 1)
        t, weight = schedule.time_of(mask_rate), jnp.where(count > 0, 1 / mask_rate, 0.0)
        x_t = mask_subset(x_0, count, mask_key, mask_id=mask_id)
        return Corruption(x_t, t, mask_rate, weight, jnp.ones_like(weight))
    if estimator == "continuous":
        t, mask_rate, weight = _continuous_noise(u, schedule)
    else:
        step = jnp.clip(jnp.ceil(u * num_timesteps), 1, num_timesteps)
        t, s = step / num_timesteps, (step - 1) / num_timesteps
        mask_rate = jnp.where(t >= 1, 1.0, schedule.mask_rate(t))
        weight = num_timesteps * unmask_probability(schedule, t, s)
    x_t = q_sample(x_0, mask_rate, mask_key, mask_id=mask_id)
    return Corruption(x_t, t, mask_rate, weight, jnp.ones_like(weight))


def mask_blocks(x_0: Tokens, key: Key[Array, ""], *, block_size: int, mask_id: int, **noise) -> Corruption:
    """Mask each block of a row as `mask_rows` does a row. Source: BD3-LM, arXiv:2503.09573, equation 8."""
    n_rows, length = x_0.shape
    n_blocks = -(-length // block_size)
    # The last block is filled up with padding, which is never masked.
    filled = jnp.pad(x_0, ((0, 0), (0, n_blocks * block_size - length)), constant_values=mask_id)
    x_t, *of_blocks = mask_rows(filled.reshape(-1, block_size), key, mask_id=mask_id, **noise)
    return Corruption(x_t.reshape(n_rows, -1)[:, :length], *(v.reshape(n_rows, n_blocks) for v in of_blocks))


def mix_rows(
    x_0: Tokens,
    key: Key[Array, ""],
    *,
    schedule: Schedule,
    mask_id: int,
    estimator: Estimator,
    times: Times,
    uniform_share: float,
) -> Corruption:
    """Noise rows with random tokens, and with masks unless the uniform share is 1.

    With `count`, n of L positions are noise, n ~ U{0 .. L}, and the share b of noise is drawn given n, from
    Beta(max(n, 1), L + 1 - n). That is the joint law of b ~ U(0, 1) and n ~ Binomial(L, b), but in other proportions
    where n > 0, which the ratio (L + 1) b / n makes up for; the weight is that times dm / db. It has finite variance,
    which continuous times have not under a linear schedule.
    """
    order_key, time_key, share_key, noise_key = jax.random.split(key, 4)
    u = jax.random.permutation(order_key, low_discrepancy(time_key, len(x_0), times))
    if estimator == "continuous":
        m, slope, count = schedule.mask_rate(u), schedule.dmask_rate(u), None
        t, ratio = u, jnp.ones_like(u)
    else:
        length = (x_0 < mask_id).sum(axis=1)
        count = jnp.clip(jnp.ceil(u * (length + 1)).astype(jnp.int32) - 1, 0, length)
        noise = jax.random.beta(share_key, jnp.maximum(count, 1), length + 1 - count)
        noise = jnp.clip(noise, 1e-30, 1 - 2**-20)
        m, slope = jax.jvp(lambda b: mask_rate_of(b, uniform_share), (noise,), (jnp.ones_like(noise),))
        ratio = jnp.where(count > 0, (length + 1) * noise / jnp.maximum(count, 1), 1.0)
        t = schedule.time_of(m)
    x_t = q_sample_mixed(x_0, shares(m, uniform_share), noise_key, mask_id=mask_id, count=count)
    return Corruption(x_t, t, m, slope * ratio, ratio)


def shift_right(x_0: Tokens, segment_ids: Tokens | None = None, *, begin_id: int) -> Tokens:
    """Return the token before each position, and `begin_id` before a row's (or a document's) first.

    >>> shift_right(jnp.array([[5, 6, 7]]), begin_id=9).tolist()
    [[9, 5, 6]]
    """
    before = jnp.pad(x_0[:, :-1], ((0, 0), (1, 0)), constant_values=begin_id)
    if segment_ids is None:
        return before
    segment_before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return jnp.where(segment_ids == segment_before, before, begin_id)


def _paired_counts(
    length: Int[Array, "B"], order_key: Key[Array, ""], time_key: Key[Array, ""], times: Times
) -> Int[Array, "B"]:
    """Draw counts n and L + 1 - n for each two neighbouring rows: each is uniform on 1..L, their sum is fixed.

    The last of an odd number of rows has no neighbour.
    """
    n_rows = len(length)
    half = low_discrepancy(time_key, -(-n_rows // 2), times) / 2  # in (0, 1/2]
    pair_key, swap_key = jax.random.split(order_key)
    u = jnp.repeat(jax.random.permutation(pair_key, half), 2)[:n_rows]
    swap = jnp.repeat(jax.random.bernoulli(swap_key, shape=half.shape), 2)[:n_rows]
    count = jnp.ceil(u * length).astype(jnp.int32)
    second = (jnp.arange(n_rows) % 2 == 1) != swap
    return jnp.where(second, length + 1 - count, count)


def _continuous_noise(
    u: Float[Array, "B"], schedule: Schedule
) -> tuple[Float[Array, "B"], Float[Array, "B"], Float[Array, "B"]]:
    """Return times, mask rates and weights for u ~ U(0, 1].

    A schedule whose mask rate only runs from a to b jumps from 0 to a at t = 0 and from b to 1 at t = 1. Each jump is
    drawn as often as it is high, and adds its step of the bound: the cross-entropy at rate a, and (1 - b) times that
    of an all-masked row.
    """
    a, b = schedule.start, schedule.end
    if (a, b) == (0, 1):
        return u, schedule.mask_rate(u), schedule.weight(u)
    t = jnp.clip((u - a) / (b - a), 0, 1)
    first, last = u <= a, u > b
    mask_rate = jnp.where(first, a, jnp.where(last, 1.0, schedule.mask_rate(t)))
    inner = schedule.weight(t) / (b - a)
    return t, mask_rate, jnp.where(first, 1 / max(a, 1e-30), jnp.where(last, 1.0, inner))
