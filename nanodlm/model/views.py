"""What each position may read: keys of earlier blocks, the cache that decoding keeps, and the masks of both."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int


class Past(NamedTuple):
    """What layers keep of P clean positions for others to read; those of all layers are stacked along a first axis."""

    keys: Float[Array, "*N B P H E"]
    """After RoPE."""
    values: Float[Array, "*N B P H E"]
    inputs: Float[Array, "*N B P D"]
    """The convolution's; D is 0 when there is none."""


class Cache(NamedTuple):
    """The last clean positions of each row: a pytree of constant shapes, fit to be carried by `jax.lax.scan`."""

    layers: Past
    """Of the positions count - window to count - 1; those below 0 are not written yet and never read."""
    count: Int[Array, ""]  # type: ignore[reportIncompatibleMethodOverride]
    """Tokens seen so far, the same for all rows."""


class Reads(NamedTuple):
    """What Q positions read of K: masks, whose first axis is 1 when all rows are alike."""

    attention: Bool[Array, "#B Q K"]
    convolution: Sequence[Bool[Array, "#B Q"]]
    """For each offset of the convolution, whether a position reads that neighbour."""


class View(NamedTuple):
    """What the Q positions of a stream read."""

    positions: Int[Array, "Q"]
    own: Reads | None = None
    """Of the stream itself; None is everything."""
    past: Reads | None = None
    """Of the `Past` it is given."""
    start: int = 0
    """The place, in that past, of the stream's first position."""
