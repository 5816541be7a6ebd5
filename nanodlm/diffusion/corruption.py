"""Noised rows, and the weights that make the bound of them unbiased."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanodlm.diffusion.schedules import Schedule


class Corruption(NamedTuple):
    """Noised rows, and what makes the bound of them unbiased.

    All but the rows have shape (B,), or (B, K) when each of a row's K blocks has its own noise.

    Attributes:
        x_t: Token ids.
        t: The time that the network is told, in [0, 1].
        mask_rate: m, how much is noise, in [0, 1].
        weight: Of the bound, per unit of the times or counts drawn.
        ratio: The part of `weight` that makes up for drawing noise in other proportions than it has: 1 but for counts
            of mixed noise.
    """

    x_t: Int[Array, "B L"]
    t: Float[Array, "B *K"]
    mask_rate: Float[Array, "B *K"]
    weight: Float[Array, "B *K"]
    ratio: Float[Array, "B *K"]


def _continuous_noise(
    u: Float[Array, "B"], schedule: Schedule
) -> tuple[Float[Array, "B"], Float[Array, "B"], Float[Array, "B"]]:
    """Times, mask rates and weights for u ~ U(0, 1].

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


def shift_right(
    x_0: Int[Array, "B L"], segment_ids: Int[Array, "B L"] | None = None, *, begin_id: int
) -> Int[Array, "B L"]:
    """The token before each position, `begin_id` before a row's (or a document's) first.

    >>> shift_right(jnp.array([[5, 6, 7]]), begin_id=9).tolist()
    [[9, 5, 6]]
    """
    before = jnp.pad(x_0[:, :-1], ((0, 0), (1, 0)), constant_values=begin_id)
    if segment_ids is None:
        return before
    return jnp.where(
        segment_ids == jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1), before, begin_id
    )
