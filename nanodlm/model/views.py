"""What each position may read: keys of earlier blocks, the cache that decoding keeps, and the masks of both."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class Past(NamedTuple):
    """Hold what layers keep of P clean positions for others to read; all layers are stacked along a first axis."""

    keys: Float[Array, "*N B P H E"]  # after RoPE
    values: Float[Array, "*N B P H E"]
    inputs: Float[Array, "*N B P D"]  # the convolution's; D is 0 when there is none


class Cache(NamedTuple):
    """Hold the last clean positions of each row: a pytree of constant shapes, which `jax.lax.scan` can carry."""

    layers: Past  # of the positions count - window to count - 1; those below 0 are not written yet and never read
    count: Int[Array, ""]  # type: ignore[reportIncompatibleMethodOverride]  # tokens seen so far, the same for all rows


Places = tuple[Int[Array, "_"], Int[Array, "_ _"]]  # positions, and the documents that they belong to in each row


class Reads(NamedTuple):
    """Say what Q positions read of K: masks, whose first axis is 1 when all rows are alike."""

    attention: Bool[Array, "#B Q K"]
    convolution: Sequence[Bool[Array, "#B Q"]]  # for each of its offsets, whether a position reads that neighbour


class View(NamedTuple):
    """Say what the Q positions of a stream read."""

    positions: Int[Array | np.ndarray, "Q"]
    own: Reads | None = None  # of the stream itself; None is everything
    past: Reads | None = None  # of the `Past` it is given
    start: int = 0  # the place, in that past, of the stream's first position


def view_of_row(
    length: int, segment_ids: Int[Array, "B L"] | None, block_size: int, conv_width: int, beside_context: bool = False
) -> View:
    """Return what the positions of a whole row read: their own document, their block (0 is none) and those before it.

    With `beside_context`, the blocks before it are those of a clean row that is given as the past.
    """
    positions = np.arange(length)  # of NumPy, so that XLA takes sines of them once, when it compiles
    if not block_size and segment_ids is None:
        return View(positions)
    row = jnp.arange(length), jnp.zeros((1, length), jnp.int32) if segment_ids is None else segment_ids
    reads = partial(_reads, row, row, block_size=block_size, conv_width=conv_width)
    return View(positions, reads((0, 0)), reads((1, length))) if beside_context else View(positions, reads((0, length)))


def view_behind(cache: Cache, length: int, block_size: int, conv_width: int) -> View:
    """Return what the `length` positions behind the cached ones read: each other's blocks, and the cache's window."""
    window = cache.layers.keys.shape[2]
    most = window // block_size
    after, before = cache.count + jnp.arange(length), cache.count + jnp.arange(-window, 0)
    queries = after, jnp.zeros((1, length), jnp.int32)
    keys = before, jnp.zeros((1, window), jnp.int32)
    reads = partial(_reads, queries, block_size=block_size, conv_width=conv_width)
    return View(after, reads(queries, (0, most)), reads(keys, (1, most), start=window), window)


def view_within(start: Int[Array, ""], size: int, length: int, conv_width: int) -> View:
    """Return what `size` positions of a row from `start` on read: each other, and the past of all the row outside.

    Inputs of the past's convolution are those of the positions and of their neighbours on both sides alone.
    """
    reach = conv_width // 2
    row, near = jnp.arange(length), start - reach + jnp.arange(size + 2 * reach)
    inside = (near >= 0) & (near < length) & ((near < start) | (near >= start + size))
    outside = jnp.broadcast_to((row < start) | (row >= start + size), (1, size, length))
    own = Reads(jnp.ones((1, size, size), bool), [jnp.ones((1, size), bool)] * conv_width)
    past = Reads(outside, [inside[None, offset : offset + size] for offset in range(conv_width)])
    return View(start + jnp.arange(size), own, past, reach)


def _reads(
    queries: Places, keys: Places, blocks_back: tuple[int, int], *, block_size: int, conv_width: int, start: int = 0
) -> Reads:
    """Return what queries read of keys: positions of the same document, from the least to the most blocks back.

    Positions below 0 do not exist. `start` is the first query's index among the keys. Block size 0 is none.
    """
    (query, query_ids), (key, key_ids), (least, most) = queries, keys, blocks_back

    def seen(q: Array, k: Array, q_ids: Array, k_ids: Array) -> Array:
        if not block_size:
            return q_ids == k_ids
        blocks = q // block_size - k // block_size
        return (k >= 0) & (least <= blocks) & (blocks <= most) & (q_ids == k_ids)

    reach = conv_width // 2
    beside = jnp.pad(key, (reach, reach + len(query)), constant_values=-1)
    beside_ids = jnp.pad(key_ids, ((0, 0), (reach, reach + len(query))), constant_values=-1)
    places = [slice(start + offset, start + offset + len(query)) for offset in range(conv_width)]
    return Reads(
        attention=seen(query[:, None], key, query_ids[:, :, None], key_ids[:, None, :]),
        convolution=[seen(query, beside[at], query_ids, beside_ids[:, at]) for at in places],
    )
