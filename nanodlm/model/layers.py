"""The layers of the network: rotary positions, projections, a short convolution, and the block that joins them."""

import math
from collections.abc import Sequence
from functools import partial, reduce
from operator import add

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from nanodlm.devices.products import attention, convolve, neighbours, product, wide
from nanodlm.model.views import Past, View

NORMAL = nnx.initializers.normal


def rope(x: Float[Array, "B L H D"], positions: Int[Array | np.ndarray, "L"]) -> Float[Array, "B L H D"]:
    """Rotate pairs of channels by angles proportional to the position. Source: RoFormer, arXiv:2104.09864, eq. 34."""
    half = x.shape[-1] // 2
    frequencies = 10_000 ** -(np.arange(half) / half)
    angles = positions[:, None].astype(np.float32) * frequencies.astype(np.float32)  # (L, D/2)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


def time_embedding(t: Float[Array, "B"], dim: int) -> Float[Array, "B D"]:
    """Return sinusoids of 1000 t. Source: DDPM, arXiv:2006.11239, appendix B."""
    half = dim // 2
    angles = 1000 * t[:, None] * jnp.exp(-math.log(10_000) * jnp.arange(half) / half)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


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
        if near is None:
            return convolve(x, kernel)
        of_each = zip(neighbours(x, len(kernel), start, near[0].shape[1]), kernel, near, strict=True)
        return reduce(add, (of * weight * reads[..., None] for of, weight, reads in of_each))


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
        qkv = self.qkv(h).reshape(*h.shape[:2], self.n_heads, 3, -1)
        q, k, v = (part.squeeze(3) for part in jnp.split(qkv, 3, axis=3))
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
        h = self.mlp_in(h)  # to be ReLU's square, for which XLA would make an array of zeros on a CPU
        x = x + self.mlp_out(jnp.where(h <= 0, 0, jnp.square(h))) * (1 + gate_m)
        return x, kept
