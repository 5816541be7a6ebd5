"""Masking schedules: how the probability that a token is still unmasked falls from 1 (t=0) to 0 (t=1).

schedule = make_schedule("linear")
schedule.alpha(0.25)   # 0.75 of the tokens are unmasked
schedule.dalpha(0.25)  # -1.0
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

KINDS = ("linear", "cosine", "sqrt", "poly")


@dataclass(frozen=True)
class Schedule:
    """A schedule with alpha(0) = 1 and alpha(1) = 0, so that neither end adds a term to the bound.

    It is held through the mask rate m(t) = 1 - alpha(t), which stays exact in float32 near t = 0, where
    1 - alpha(t) would cancel.

    Attributes:
        kind: Its name.
        mask_rate: m(t), increasing from 0 to 1.
        dmask_rate: m'(t) >= 0; it may be infinite at t = 0.
        time_of: The inverse of m: the time at which a given share of tokens is masked.
    """

    kind: str
    mask_rate: Callable[[Float[Array, "..."]], Float[Array, "..."]]
    dmask_rate: Callable[[Float[Array, "..."]], Float[Array, "..."]]
    time_of: Callable[[Float[Array, "..."]], Float[Array, "..."]]

    def alpha(self, t: Float[Array, "..."] | float) -> Float[Array, "..."]:
        """Probability that a token is unmasked at time t, in [0, 1].

        >>> float(make_schedule("sqrt").alpha(0.25))
        0.5
        """
        return 1.0 - self.mask_rate(jnp.asarray(t, jnp.float32))

    def dalpha(self, t: Float[Array, "..."] | float) -> Float[Array, "..."]:
        """Derivative of alpha with respect to t, at most 0.

        >>> float(make_schedule("linear").dalpha(0.3))
        -1.0
        """
        return -self.dmask_rate(jnp.asarray(t, jnp.float32))

    def weight(self, t: Float[Array, "..."]) -> Float[Array, "..."]:
        """Weight of the continuous-time bound, -alpha'(t) / (1 - alpha(t)), for t in (0, 1].

        Source: MD4, arXiv:2406.04329, equation 4; MDLM, arXiv:2406.07524, equation 10.

        >>> float(make_schedule("linear").weight(jnp.float32(0.25)))
        4.0
        """
        mask_rate = self.mask_rate(t)
        # Where a steep schedule's rate underflows to 0, no token is masked and 0 / 0 would spoil the sum.
        return jnp.where(mask_rate > 0, self.dmask_rate(t) / mask_rate, 0.0)


def make_schedule(kind: str, *, exponent: float = 2.0) -> Schedule:
    """Build a schedule by name.

    | kind | alpha(t) | source |
    |---|---|---|
    | linear | 1 - t | D3PM, arXiv:2107.03006, section 3.1 |
    | cosine | 1 - cos(pi/2 (1 - t)) | MaskGIT, arXiv:2202.04200; MD4, arXiv:2406.04329, table 4 |
    | sqrt | 1 - sqrt(t) | Diffusion-LM, arXiv:2205.14217, appendix A |
    | poly | 1 - t^exponent | MD4, arXiv:2406.04329, table 4 |

    Args:
        kind: One of `KINDS`.
        exponent: The power of `poly`, > 0; the others have none.

    Raises:
        ValueError: For an unknown kind or an exponent that is not positive.

    >>> float(make_schedule("poly", exponent=3.0).alpha(0.5))
    0.875
    """
    if kind == "cosine":
        return Schedule(
            kind,
            mask_rate=lambda t: jnp.where(t >= 1, 1.0, jnp.sin(math.pi / 2 * t)),
            dmask_rate=lambda t: math.pi / 2 * jnp.sin(math.pi / 2 * (1 - t)),  # cos(pi/2 t) is negative at t = 1
            time_of=lambda m: jnp.arcsin(m) * 2 / math.pi,
        )
    powers = {"linear": 1.0, "sqrt": 0.5, "poly": exponent}
    if kind not in powers:
        raise ValueError(f"unknown schedule {kind!r}: choose one of {', '.join(KINDS)}")
    power = powers[kind]
    if power <= 0:
        raise ValueError(f"the exponent of a poly schedule must be positive, not {power}")
    return Schedule(
        kind,
        mask_rate=lambda t: _power(t, power),
        dmask_rate=lambda t: power * _power(t, power - 1),
        time_of=lambda m: _power(m, 1 / power),
    )


def _power(t: Float[Array, "..."], p: float) -> Float[Array, "..."]:
    """t^p without the rounding of exp(p log t) where a plain operation does."""
    if p == 0:
        return jnp.ones_like(t)
    if p == 1:
        return t
    if p == 0.5:
        return jnp.sqrt(t)
    if p == -0.5:
        return jax.lax.rsqrt(t)
    return t**p
