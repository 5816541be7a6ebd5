"""What the public functions of the science accept.

Shapes and settings are checked when a function is called or traced, and values where they are known then, so that a
compiled program does no more work. What only it can know ends in NaN (`nelbo`) or in ids of -1 (the samplers).
"""

from collections.abc import Sequence
from operator import index
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key, UInt32

Rows = ArrayLike | Sequence[int] | Sequence[Sequence[int]]
Seed = Key[Array, ""] | UInt32[Array, "2"] | int


def require(sound: bool, message: str) -> None:
    """Raise a ValueError with this message unless it is sound."""
    if not sound:
        raise ValueError(message)


def require_whole(name: str, value: Any, least: int = 1) -> None:
    """Raise a ValueError unless a setting is a whole number of at least `least`."""
    whole = hasattr(value, "__index__") and not isinstance(value, bool | Tracer)
    require(whole, f"{name} must be a whole number, not {value!r}")
    require(index(value) >= least, f"{name} must {f'be at least {least}' if least else 'not be negative'}, not {value}")


def token_ids(name: str, rows: Rows, mask_id: int, *, padding: bool = False) -> Int[Array, "..."]:
    """Return one row of token ids, or several of equal length, as an array; anything else is a ValueError.

    They go from 0 to `mask_id`; with `padding`, one larger id may stand for that. Messages call them by `name`.
    """
    given: Any = rows
    dtype = getattr(rows, "dtype", None)
    if not isinstance(rows, jax.Array) and dtype is not None and dtype.kind in "iu" and given.size:
        low, high = int(given.min()), int(given.max())  # of NumPy's integers, which JAX would wrap
        require(-(2**31) <= low and high < 2**31, f"{name} holds the id {max(high, -low)}: ids fit into 32 bits")
    try:
        ids = jnp.asarray(rows)
    except OverflowError as error:
        raise ValueError(f"{name} holds an id that does not fit into 32 bits") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is one row of token ids, or several of one length") from error
    sound = ids.ndim in (1, 2) and (jnp.issubdtype(ids.dtype, jnp.integer) or ids.size == 0)
    require(sound, f"{name} is one row of token ids, or several, not {ids.dtype} of shape {ids.shape}")
    if ids.size and not isinstance(ids, Tracer):
        with jax.ensure_compile_time_eval():
            low, high = int(ids.min()), int(ids.max())
            beyond = int(jnp.where(ids > mask_id, ids, high).min())
        require(low >= 0, f"{name} holds the id {low}: ids begin at 0, and padding has one above the mask")
        require(padding or high <= mask_id, f"{name} holds the id {high}, which is beyond that of the mask, {mask_id}")
        require(beyond == high, f"{name} holds ids above the mask, {mask_id}, from {beyond} to {high}: padding has one")
    return ids.astype(jnp.int32)


def check_logits(logits: Float[Array, "... V"], ids: Int[Array, "B L"]) -> Float[Array, "B L V"]:
    """Return a network's logits, which must have the shape of its ids and one more axis, of all ids."""
    fits = logits.ndim == 3 and logits.shape[:2] == ids.shape
    require(fits, f"the network gave logits of shape {logits.shape} for ids of shape {ids.shape}: V must follow these")
    if not isinstance(ids, Tracer):
        with jax.ensure_compile_time_eval():
            high, scored = int(ids.max()), logits.shape[2]
        require(high < scored, f"x_0 holds the id {high}: the network scores ids up to {scored - 1}")
    return logits


def random_key(key: Seed) -> Key[Array, ""] | UInt32[Array, "2"]:
    """Return a key of randomness, which an integer stands for as well."""
    if isinstance(key, int):
        return jax.random.key(key)
    typed = isinstance(key, jax.Array) and (jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.dtype == jnp.uint32)
    require(typed, f"the key must be jax.random.key(seed), or a seed, not {type(key).__name__}")
    return key


def finite_tokens(tokens: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """Return what a sampler drew; ids of -1, for logits from which nothing can be drawn, are a ValueError if known."""
    sound = isinstance(tokens, Tracer) or bool((tokens >= 0).all())
    require(sound, "the network gave logits that are not finite: nothing can be drawn")
    return tokens
