"""The layers of the network: rotary positions, projections, a short convolution, and the block that joins them."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from nanodlm.model.views import Past, View

NORMAL = nnx.initializers.normal


def rope(x: Float[Array, "B L H D"], positions: Int[Array, "L"]) -> Float[Array, "B L H D"]:
    """Rotate pairs of channels by angles proportional to the position. Source: RoFormer, arXiv:2104.09864, eq. 34."""
    half = x.shape[-1] // 2
    angles = positions[:, None] / 10_000 ** (jnp.arange(half) / half)  # (L, D/2)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


def time_embedding(t: Float[Array, "B"], dim: int) -> Float[Array, "B D"]:
    """Return sinusoids of 1000 t. Source: DDPM, arXiv:2006.11239, appendix B."""
    half = dim // 2
    angles = 1000 * t[:, None] * jnp.exp(-math.log(10_000) * jnp.arange(half) / half)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """Return the type of what products of a type give, and of all that is not a product.

    On a CPU it is float32 at least: XLA multiplies bfloat16 fast only into float32 there, and adds it slowly. On an
    accelerator it is the type itself, half of the bytes; sums are float32 within a product anyway.
    """
    return jnp.promote_types(dtype, jnp.float32) if jax.default_backend() == "cpu" else dtype


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


class Linear(nnx.Linear):
    """A linear layer without bias that multiplies in two dimensions, which XLA's CPU backend does faster."""

    def __call__(self, inputs: Float[Array, "... D"], out_sharding: None = None) -> Float[Array, "... E"]:
        """Map the last axis."""
        flat = inputs.reshape(-1, inputs.shape[-1])
        return jnp.reshape(product("nd,de->ne", self.dtype, flat, self.kernel[...]), (*inputs.shape[:-1], -1))


class ShortConvolution(nnx.Module):
    """A depthwise convolution over neighbouring positions."""

    def __init__(self, width: int, dim: int, rngs: nnx.Rngs):
        self.kernel = nnx.Param(NORMAL(0.3)(rngs.params(), (width, dim)))

    def __call__(
        self, x: Float[Array, "B K D"], near: Sequence[Bool[Array, "#B Q"]] | None = None, start: int = 0
    ) -> Float[Array, "B Q D"]:
        """For each position i, sum over offsets o of kernel[o] * x[start + i + o], zero outside x.

        For each offset, `near` says whether position i may read that neighbour; None is always, with Q = K.
        """
        kernel = self.kernel[...].astype(wide(x.dtype))
        reach = len(kernel) // 2
        batch, size, dim = x.shape
        length = size if near is None else near[0].shape[1]
        padded = jnp.pad(x, ((0, 0), (reach, reach + max(0, start + length - size)), (0, 0)))
        out = jnp.zeros((batch, length, dim), kernel.dtype)
        for offset in range(len(kernel)):
            term = padded[:, start + offset : start + offset + length] * kernel[offset]
            out += term if near is None else term * near[offset][..., None]
        return out


class Block(nnx.Module):
    """Optional convolution, attention and feed-forward layer, each added to the residual stream."""

    def __init__(
        self,
        *,
        n_heads: int,
        d_model: int,
        d_ff: int,
        conv_width: int,
        time_conditioning: bool,
        qk_norm: bool,
        zero_init: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        linear = partial(Linear, use_bias=False, dtype=dtype, rngs=rngs)
        norm = partial(nnx.RMSNorm, dtype=wide(dtype), rngs=rngs)
        zeros = nnx.initializers.zeros_init()
        output = zeros if zero_init else NORMAL(0.02)
        self.n_heads, self.dtype = n_heads, dtype
        self.conv = ShortConvolution(conv_width, d_model, rngs) if conv_width else None
        self.conv_norm = norm(d_model) if conv_width else None
        self.attention_norm = norm(d_model)
        self.qkv = linear(d_model, 3 * d_model, kernel_init=NORMAL(d_model**-0.5))
        self.query_norm = norm(d_model // n_heads) if qk_norm else None
        self.key_norm = norm(d_model // n_heads) if qk_norm else None
        self.attention_out = linear(d_model, d_model, kernel_init=output)
        self.mlp_norm = norm(d_model)
        self.mlp_in = linear(d_model, d_ff, kernel_init=NORMAL(d_model**-0.5))
        self.mlp_out = linear(d_ff, d_model, kernel_init=output)
        self.modulation = linear(d_model, 6 * d_model, kernel_init=zeros) if time_conditioning else None

    def __call__(
        self, x: Float[Array, "B Q D"], view: View, condition: Float[Array, "B #Q D"] | None, past: Past | None
    ) -> tuple[Float[Array, "B Q D"], Past]:
        """Run one block; return the residual stream and what the block would keep of these positions.

        Positions read what the view says, of the stream and of the past outside it. The condition modulates the block
        by AdaLN (Source: DiT, arXiv:2212.09748, section 3.2).
        """
        # Zero at the start, so that a conditioned network begins as the plain one.
        modulation = [jnp.zeros((), x.dtype)] * 6
        if self.modulation is not None and condition is not None:
            modulation = jnp.split(self.modulation(condition), 6, axis=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        inputs = x[..., :0].astype(self.dtype)
        if self.conv is not None and self.conv_norm is not None:
            inputs = self.conv_norm(x).astype(self.dtype)
            x = x + self.conv(inputs, view.own.convolution if view.own else None)
            if past is not None and view.past is not None:
                x = x + self.conv(past.inputs, view.past.convolution, view.start)
        h = self.attention_norm(x) * (1 + scale_a) + shift_a
        # Each head's queries, keys and values lie together, so that cutting the columns cuts between heads.
        q, k, v = jnp.moveaxis(self.qkv(h).reshape(*h.shape[:2], self.n_heads, 3, -1), 3, 0)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = (a.astype(self.dtype) for a in (rope(q, view.positions), rope(k, view.positions), v))
        kept = Past(k, v, inputs)
        if past is not None:
            k, v = jnp.concatenate([past.keys, k], axis=1), jnp.concatenate([past.values, v], axis=1)
        masks = [reads.attention for reads in (view.past, view.own) if reads is not None]
        mask = jnp.concatenate(masks, axis=2)[:, None] if masks else None
        h = attention(q, k, v, mask)
        x = x + self.attention_out(h.reshape(*q.shape[:2], -1)) * (1 + gate_a)
        h = self.mlp_norm(x) * (1 + scale_m) + shift_m
        x = x + self.mlp_out(jnp.square(jax.nn.relu(self.mlp_in(h)))) * (1 + gate_m)
        return x, kept


def attention(
    q: Float[Array, "B Q H E"],
    k: Float[Array, "B K H E"],
    v: Float[Array, "B K H E"],
    mask: Bool[Array, "#B 1 Q K"] | None,
) -> Float[Array, "B Q H E"]:
    """Attend to the positions that a mask allows; products are in the type of q, k and v, the softmax in float32.

    On a GPU that has it, it is cuDNN's fused attention, where that takes the arguments.
    """
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
