"""Products of arrays, and attention, in the types and the order in which each kind of device does them fast."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """Return the type of what products of a type give, and of all that is not a product.

    On a CPU it is float32 at least: XLA multiplies bfloat16 fast only into float32 there, and adds it slowly. On an
    accelerator it is the type itself, half of the bytes; sums are float32 within a product anyway.
    """
    return jnp.promote_types(dtype, jnp.float32) if jax.default_backend() == "cpu" else dtype


def together() -> int:
    """Return how many layers are compiled one after the other: in a loop, XLA copies what it keeps of each on a CPU."""
    return 4 if jax.default_backend() == "cpu" else 1


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def product(equation: str, dtype: jnp.dtype, a: Array, b: Array) -> Array:
    """Multiply two arrays as `einsum` does, both rounded to a type first, and their gradients' products likewise.

    Gradients come in the arrays' own types, so that those of float32 parameters are not rounded.

    >>> product("nd,de->ne", jnp.dtype("bfloat16"), jnp.ones((2, 3)), jnp.ones((3, 4))).shape
    (2, 4)
    """
    return _multiply(equation, a.astype(dtype), b.astype(dtype))


def _product_forward(equation: str, dtype: jnp.dtype, a: Array, b: Array) -> tuple[Array, Any]:
    rounded = a.astype(dtype), b.astype(dtype)
    return _multiply(equation, *rounded), (*rounded, a[:0], b[:0])  # the last two for their types


def _product_backward(equation: str, dtype: jnp.dtype, kept: Any, gradient: Array) -> tuple[Array, Array]:
    a, b, of_a, of_b = kept
    first, second, out = equation.replace("->", ",").split(",")
    gradient = gradient.astype(dtype)
    d_a, d_b = _multiply(f"{out},{second}->{first}", gradient, b), _multiply(f"{first},{out}->{second}", a, gradient)
    return d_a.astype(of_a.dtype), d_b.astype(of_b.dtype)


product.defvjp(_product_forward, _product_backward)


def _multiply(equation: str, a: Array, b: Array) -> Array:
    """Multiply two arrays of a type, on a CPU in the only order that XLA multiplies fast there.

    That has the array whose axes come first in the result at the left, with the axes that are summed over at its end.
    They are moved there behind a barrier, or XLA would merge that with the product and multiply several times slower.
    """
    left, right, out = equation.replace("->", ",").split(",")
    if jax.default_backend() == "cpu":
        if next(axis for axis in out if (axis in left) != (axis in right)) in right:
            left, right, a, b = right, left, b, a
        last = "".join(sorted(left, key=lambda axis: axis not in out))
        if last != left:
            a = jax.lax.optimization_barrier(jnp.einsum(f"{left}->{last}", a))
        left = last
    return jnp.einsum(f"{left},{right}->{out}", a, b, preferred_element_type=wide(a.dtype))


def attention(
    q: Float[Array, "B Q H E"],
    k: Float[Array, "B K H E"],
    v: Float[Array, "B K H E"],
    mask: Bool[Array, "#B 1 Q K"] | None,
) -> Float[Array, "B Q H E"]:
    """Attend to the positions that a mask allows; products are in the type of q, k and v, the softmax in float32."""
    if jax.default_backend() != "cpu":
        kernel = "cudnn" if _fits_cudnn(q, k) else "xla"
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=kernel)
    scores = product("bqhe,bkhe->bhqk", q.dtype, q, k) * q.shape[-1] ** -0.5
    shares = jax.nn.softmax(scores if mask is None else jnp.where(mask, scores, jnp.finfo(scores.dtype).min))
    return product("bhqk,bkhe->bqhe", q.dtype, shares, v)


def _fits_cudnn(q: Float[Array, "B Q H E"], k: Float[Array, "B K H E"]) -> bool:
    """Say if cuDNN's fused attention takes it: half precision, small heads, even lengths, a recent GPU."""
    fits = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0
    if not fits or q.shape[1] % 2 or k.shape[1] % 2 or jax.default_backend() != "gpu":
        return False
    major = str(getattr(jax.devices()[0], "compute_capability", "")).partition(".")[0]
    return major.isdecimal() and int(major) >= 8
