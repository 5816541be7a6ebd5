"""Products of arrays, and attention, in the types and the order in which each kind of device does them fast."""

from functools import partial, reduce
from operator import add, mul
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
    The axis Z of one is there because XLA takes what comes straight from a transposition for an array in another order,
    and multiplies that in float32.
    """
    left, right, out = equation.replace("->", ",").split(",")
    if jax.default_backend() == "cpu":
        if next(axis for axis in out if (axis in left) != (axis in right)) in right:
            left, right, a, b = right, left, b, a
        last = "".join(sorted(left, key=lambda axis: axis not in out))
        if last != left:
            a = jax.lax.optimization_barrier(jnp.einsum(f"{left}->{last}", a))
            a, b, last, right, out = a[None], b[None], f"Z{last}", f"Z{right}", f"Z{out}"
            return jnp.einsum(f"{last},{right}->{out}", a, b, preferred_element_type=wide(a.dtype))[0]
    return jnp.einsum(f"{left},{right}->{out}", a, b, preferred_element_type=wide(a.dtype))


def neighbours(x: Float[Array, "B K D"], width: int, start: int, length: int) -> list[Float[Array, "B Q D"]]:
    """Return x around the positions from `start` on, one array for each of `width` offsets, zero outside x."""
    reach = width // 2
    padded = jnp.pad(x, ((0, 0), (reach, reach + max(0, start + length - x.shape[1])), (0, 0)))
    return [padded[:, start + offset : start + offset + length] for offset in range(width)]


@jax.custom_vjp
def convolve(x: Float[Array, "B L D"], kernel: Float[Array, "W D"]) -> Float[Array, "B L D"]:
    """Sum neighbours of each position, weighed by a kernel of odd width, each channel by itself.

    The gradient is such a sum too, which XLA's CPU backend makes several times as fast as it adds up slices'.

    >>> convolve(jnp.ones((1, 3, 1)), jnp.array([[1.0], [2.0], [4.0]])).squeeze().tolist()
    [6.0, 7.0, 3.0]
    """
    return reduce(add, map(mul, neighbours(x, len(kernel), 0, x.shape[1]), kernel))


def _convolve_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = kept
    d_kernel = [(near * gradient).sum((0, 1)) for near in neighbours(x, len(kernel), 0, x.shape[1])]
    return convolve(gradient, kernel[::-1]).astype(x.dtype), jnp.stack(d_kernel)


convolve.defvjp(lambda x, kernel: (convolve(x, kernel), (x, kernel)), _convolve_backward)


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
