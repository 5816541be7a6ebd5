"""Noise schedules: how the probability that a token is still unmasked falls from 1 (t=0) to 0 (t=1)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nanodlm.diffusion.checks import require
from nanodlm.diffusion.kinds import ScheduleName

Rate = Callable[[Float[Array, "..."]], Float[Array, "..."]]


@dataclass(frozen=True)
class Schedule:
    """A schedule, held through the mask rate m(t) = 1 - alpha(t).

    m stays exact in float32 near t = 0, where 1 - alpha(t) would cancel. Schedules whose m does not run from 0 to 1
    jump the rest at their ends: a token masked at t = 0 is unmasked there, and what is unmasked just before t = 1 is
    masked there. `Objective.corrupt` and the samplers account for both jumps, so that the bound stays one.
    """

    kind: str
    mask_rate: Rate  # m(t), not decreasing, from `start` to `end`
    dmask_rate: Rate  # m'(t) >= 0; it may be infinite at t = 0
    time_of: Rate  # the inverse of m: the time at which a given share of tokens is masked, in [0, 1]
    start: float = 0.0  # m just after t = 0; 0 for all but the clipped forms
    end: float = 1.0  # m just before t = 1; 1 for all but the clipped forms and `loglinear`

    def alpha(self, t: Float[Array, "..."] | float) -> Float[Array, "..."]:
        """Return the probability that a token is unmasked at time t, in [0, 1].

        >>> float(make_schedule("sqrt").alpha(0.25))
        0.5
        """
        return 1.0 - self.mask_rate(jnp.asarray(t, jnp.float32))

    def dalpha(self, t: Float[Array, "..."] | float) -> Float[Array, "..."]:
        """Return the derivative of alpha with respect to t, at most 0.

        >>> float(make_schedule("linear").dalpha(0.3))
        -1.0
        """
        return -self.dmask_rate(jnp.asarray(t, jnp.float32))

    def weight(self, t: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return the weight of the continuous-time bound, -alpha'(t) / (1 - alpha(t)), for t in (0, 1].

        Source: MD4, arXiv:2406.04329, equation 4; MDLM, arXiv:2406.07524, equation 10.

        >>> float(make_schedule("linear").weight(jnp.float32(0.25)))
        4.0
        """
        mask_rate = self.mask_rate(t)
        # Where a steep schedule's rate underflows to 0, no token is masked and 0 / 0 would spoil the sum.
        return jnp.where(mask_rate > 0, self.dmask_rate(t) / mask_rate, 0.0)

    def agrees_with(self, other: "Schedule") -> bool:
        """Return whether two schedules mask equally much at all of a few times."""
        with jax.ensure_compile_time_eval():
            t = jnp.linspace(0.05, 0.95, 7)
            return bool(jnp.allclose(self.mask_rate(t), other.mask_rate(t), atol=1e-6))


def make_schedule(kind: str, *, exponent: float = 2.0, eps: float | None = None) -> Schedule:
    """Build a schedule by name; an unknown one, and what is out of range, is a ValueError.

    | kind | alpha(t) | source |
    |---|---|---|
    | linear | 1 - t | D3PM, arXiv:2107.03006, section 3.1 |
    | cosine | 1 - cos(pi/2 (1 - t)) | MaskGIT, arXiv:2202.04200; MD4, arXiv:2406.04329, table 4 |
    | sqrt | 1 - sqrt(t) | Diffusion-LM, arXiv:2205.14217, appendix A |
    | poly | 1 - t^exponent | MD4, arXiv:2406.04329, table 4 |
    | loglinear | 1 - (1 - eps) t, eps = 1e-3 | MDLM, arXiv:2406.07524, appendix E.1: exp(-sigma(t)) of SEDD's noise |
    | linear_clipped | 1 - (1 - eps) t, eps = 1e-4 | nano-dlm |
    | cosine_clipped | cos^2(phi(t)) / cos^2(phi(0)) within [eps, 1 - eps], eps = 1e-4 | nano-dlm |
    | sqrt_clipped | 1 - sqrt(t + eps) within [eps, 1 - eps], eps = 1e-4 | nano-dlm |

    with phi(t) = pi/2 (t + 0.008) / 1.008, after improved DDPM, arXiv:2102.09672, equation 17.

    Args:
        kind: One of `kinds.ScheduleName`.
        exponent: The power of `poly`, > 0; the others have none.
        eps: What `loglinear` and the clipped forms keep from their ends, in (0, 0.5); by default as in the table.

    >>> float(make_schedule("poly", exponent=3.0).alpha(0.5))
    0.875
    """
    names = get_args(ScheduleName)
    require(kind in names, f"unknown schedule {kind!r}: choose one of {', '.join(names)}")
    if eps is None:
        eps = 1e-3 if kind == "loglinear" else 1e-4
    require(0 < eps < 0.5, f"the eps of a schedule must lie between 0 and 0.5, not at {eps}")
    if kind == "cosine":
        return Schedule(
            kind,
            mask_rate=lambda t: jnp.where(t >= 1, 1.0, jnp.sin(math.pi / 2 * t)),
            dmask_rate=lambda t: math.pi / 2 * jnp.sin(math.pi / 2 * (1 - t)),  # cos(pi/2 t) is negative at t = 1
            time_of=lambda m: jnp.arcsin(m) * 2 / math.pi,
        )
    if kind in ("loglinear", "linear_clipped"):
        return Schedule(
            kind,
            mask_rate=lambda t: (1 - eps) * t,
            dmask_rate=lambda t: jnp.full_like(t, 1 - eps),
            time_of=lambda m: jnp.clip(m / (1 - eps), 0, 1),
            end=1 - eps,
        )
    if kind == "sqrt_clipped":
        return _clipped(
            kind,
            eps,
            mask_rate=lambda t: jnp.sqrt(t + eps),
            dmask_rate=lambda t: 0.5 * jax.lax.rsqrt(t + eps),
            time_of=lambda m: m**2 - eps,
            start=math.sqrt(eps),
        )
    if kind == "cosine_clipped":
        scale, first = math.pi / 2 / 1.008, math.pi / 2 * 0.008 / 1.008
        cos_first = math.cos(first)
        return _clipped(
            kind,
            eps,
            # 1 - cos^2(phi) / cos^2(first), without its cancellation near t = 0
            mask_rate=lambda t: jnp.sin(scale * t) * jnp.sin(scale * t + 2 * first) / cos_first**2,
            dmask_rate=lambda t: scale * jnp.sin(2 * (scale * t + first)) / cos_first**2,
            time_of=lambda m: (jnp.arccos(jnp.sqrt(1 - m) * cos_first) - first) / scale,
        )
    power = {"linear": 1.0, "sqrt": 0.5, "poly": float(exponent)}[kind]
    require(0 < power < math.inf, f"the exponent of a poly schedule must be positive, not {power}")
    return Schedule(
        kind,
        mask_rate=lambda t: _power(t, power),
        dmask_rate=lambda t: power * _power(t, power - 1),
        time_of=lambda m: _power(m, 1 / power),
    )


def _clipped(
    kind: str, eps: float, *, mask_rate: Rate, dmask_rate: Rate, time_of: Rate, start: float = 0.0
) -> Schedule:
    """Make a schedule whose mask rate is held within [eps, 1 - eps], flat where it is clipped."""
    start, end = max(start, eps), 1 - eps

    def slope(t: Float[Array, "..."]) -> Float[Array, "..."]:
        rate = mask_rate(t)
        return jnp.where((rate > eps) & (rate < end), dmask_rate(t), 0.0)

    def inverse(m: Float[Array, "..."]) -> Float[Array, "..."]:
        inside = jnp.clip(time_of(jnp.clip(m, start, end)), 0, 1)
        return jnp.where(m <= start, 0.0, jnp.where(m >= end, 1.0, inside))

    return Schedule(kind, lambda t: jnp.clip(mask_rate(t), eps, end), slope, inverse, start, end)


def _power(t: Float[Array, "..."], p: float) -> Float[Array, "..."]:
    """Return t^p, without the rounding of exp(p log t) where a plain operation does."""
    plain: dict[float, Rate] = {0: jnp.ones_like, 1: lambda t: t, 0.5: jnp.sqrt, -0.5: jax.lax.rsqrt}
    return plain[p](t) if p in plain else t**p
