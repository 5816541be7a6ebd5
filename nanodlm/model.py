"""The network: a bidirectional pre-norm transformer with RoPE and RMSNorm that predicts x_0 from x_t.

    model = Transformer(vocab_size=4096, n_layers=3, n_heads=4, d_model=128, d_ff=512, rngs=nnx.Rngs(0))
    logits = model(x_t, t)    # (B, L) ids, (B,) times -> (B, L, V) float32

It knows nothing of diffusion: the mask is one more token.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

NORMAL = nnx.initializers.normal


def rope(x: Float[Array, "B L H D"]) -> Float[Array, "B L H D"]:
    """Rotate pairs of channels by angles proportional to the position. Source: RoFormer, arXiv:2104.09864, eq. 34.

    >>> rope(jnp.ones((1, 2, 1, 4))).shape
    (1, 2, 1, 4)
    """
    length, half = x.shape[1], x.shape[-1] // 2
    angles = jnp.arange(length)[:, None] / 10_000 ** (jnp.arange(half) / half)  # (L, D/2)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


def time_embedding(t: Float[Array, "B"], dim: int) -> Float[Array, "B D"]:
    """Sinusoids of 1000 t. Source: DDPM, arXiv:2006.11239, appendix B.

    >>> time_embedding(jnp.zeros(2), 8).shape
    (2, 8)
    """
    half = dim // 2
    angles = 1000 * t[:, None] * jnp.exp(-math.log(10_000) * jnp.arange(half) / half)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class Linear(nnx.Linear):
    """A linear layer without bias that multiplies in two dimensions, which XLA's CPU backend does faster."""

    def __call__(self, inputs: Float[Array, "... D"], out_sharding: None = None) -> Float[Array, "... E"]:
        """Map the last axis."""
        x = inputs
        return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


class ShortConvolution(nnx.Module):
    """A depthwise convolution over neighbouring positions that never reads another document."""

    def __init__(self, width: int, dim: int, rngs: nnx.Rngs):
        self.kernel = nnx.Param(NORMAL(0.3)(rngs.params(), (width, dim)))

    def __call__(self, x: Float[Array, "B L D"], segment_ids: Int[Array, "B L"] | None = None) -> Float[Array, "B L D"]:
        """Sum over offsets o of kernel[o] * x[position + o], the edges padded with zeros."""
        kernel = self.kernel[...].astype(x.dtype)
        reach = len(kernel) // 2
        length = x.shape[1]
        padded = jnp.pad(x, ((0, 0), (reach, reach), (0, 0)))
        if segment_ids is not None:
            padded_ids = jnp.pad(segment_ids, ((0, 0), (reach, reach)), constant_values=-1)
        out = jnp.zeros_like(x)
        for offset in range(len(kernel)):
            term = padded[:, offset : offset + length] * kernel[offset]
            if segment_ids is not None:
                term *= (padded_ids[:, offset : offset + length] == segment_ids)[..., None]  # type: ignore[possibly-unbound]
            out += term
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
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        def linear(d_in: int, d_out: int, init: nnx.Initializer) -> Linear:
            return Linear(d_in, d_out, use_bias=False, kernel_init=init, dtype=dtype, rngs=rngs)

        zeros = nnx.initializers.zeros_init()
        self.n_heads = n_heads
        self.conv = ShortConvolution(conv_width, d_model, rngs) if conv_width else None
        self.conv_norm = nnx.RMSNorm(d_model, dtype=dtype, rngs=rngs) if conv_width else None
        self.attention_norm = nnx.RMSNorm(d_model, dtype=dtype, rngs=rngs)
        self.qkv = linear(d_model, 3 * d_model, NORMAL(d_model**-0.5))
        self.query_norm = nnx.RMSNorm(d_model // n_heads, dtype=dtype, rngs=rngs)
        self.key_norm = nnx.RMSNorm(d_model // n_heads, dtype=dtype, rngs=rngs)
        self.attention_out = linear(d_model, d_model, zeros)
        self.mlp_norm = nnx.RMSNorm(d_model, dtype=dtype, rngs=rngs)
        self.mlp_in = linear(d_model, d_ff, NORMAL(d_model**-0.5))
        self.mlp_out = linear(d_ff, d_model, zeros)
        self.modulation = linear(d_model, 6 * d_model, zeros) if time_conditioning else None

    def __call__(
        self,
        x: Float[Array, "B L D"],
        condition: Float[Array, "B D"] | None = None,
        segment_ids: Int[Array, "B L"] | None = None,
    ) -> Float[Array, "B L D"]:
        """One block; `condition` modulates it by AdaLN (Source: DiT, arXiv:2212.09748, section 3.2)."""
        # Zero at the start, so that a conditioned network begins as the plain one.
        modulation = [jnp.zeros((), x.dtype)] * 6
        if self.modulation is not None and condition is not None:
            modulation = jnp.split(self.modulation(condition)[:, None], 6, axis=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        if self.conv is not None and self.conv_norm is not None:
            x = x + self.conv(self.conv_norm(x), segment_ids)
        h = self.attention_norm(x) * (1 + scale_a) + shift_a
        x = x + self._attend(h, segment_ids) * (1 + gate_a)
        h = self.mlp_norm(x) * (1 + scale_m) + shift_m
        return x + self.mlp_out(jnp.square(jax.nn.relu(self.mlp_in(h)))) * (1 + gate_m)

    def _attend(self, h: Float[Array, "B L D"], segment_ids: Int[Array, "B L"] | None) -> Float[Array, "B L D"]:
        batch, length, _ = h.shape
        q, k, v = jnp.split(self.qkv(h).reshape(batch, length, 3 * self.n_heads, -1), 3, axis=2)
        same: Bool[Array, "B 1 L L"] | None = None
        if segment_ids is not None:
            same = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
        out = jax.nn.dot_product_attention(rope(self.query_norm(q)), rope(self.key_norm(k)), v, mask=same)
        return self.attention_out(out.reshape(h.shape))


class Transformer(nnx.Module):
    """The denoiser.

    Args:
        vocab_size: Ids it embeds and scores: the tokenizer's, the mask, padding.
        n_layers: Blocks.
        n_heads: Attention heads; d_model / n_heads must be even.
        d_model: Width of the residual stream.
        d_ff: Width of the feed-forward layers (squared ReLU).
        conv_width: Width of each block's depthwise convolution, odd; 0 is none.
        time_conditioning: Whether blocks see the time t.
        tie_embeddings: Whether the output layer is the embedding's transpose.
        dtype: Precision of matrix products; parameters and logits are float32.
        rngs: Initialisation.

    >>> model = Transformer(vocab_size=32, n_layers=1, n_heads=2, d_model=8, d_ff=16, rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((2, 5), int), jnp.ones(2)).shape
    (2, 5, 32)
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        n_layers: int,
        n_heads: int,
        d_model: int,
        d_ff: int,
        conv_width: int = 0,
        time_conditioning: bool = False,
        tie_embeddings: bool = False,
        dtype: jnp.dtype | str = "float32",
        rngs: nnx.Rngs,
    ):
        compute = jnp.dtype(dtype)
        # As an output layer, a tied embedding must start with small logits.
        init = NORMAL(0.5 * d_model**-0.5 if tie_embeddings else 0.5)
        self.embedding = nnx.Embed(vocab_size, d_model, embedding_init=init, dtype=compute, rngs=rngs)
        self.time_in = nnx.Linear(d_model, d_model, rngs=rngs) if time_conditioning else None
        self.blocks = nnx.List(
            Block(
                n_heads=n_heads,
                d_model=d_model,
                d_ff=d_ff,
                conv_width=conv_width,
                time_conditioning=time_conditioning,
                dtype=compute,
                rngs=rngs,
            )
            for _ in range(n_layers)
        )
        self.norm = nnx.RMSNorm(d_model, dtype=compute, rngs=rngs)
        zeros = nnx.initializers.zeros_init()
        head = Linear(d_model, vocab_size, use_bias=False, kernel_init=zeros, dtype=compute, rngs=rngs)
        self.head = None if tie_embeddings else head

    def __call__(
        self, x_t: Int[Array, "B L"], t: Float[Array, "B"], segment_ids: Int[Array, "B L"] | None = None
    ) -> Float[Array, "B L V"]:
        """Logits of x_0 at every position, in float32.

        Args:
            x_t: Token ids, masks included.
            t: Times in [0, 1]; read only with time conditioning.
            segment_ids: Which document each position belongs to; attention and convolution stay within one.
        """
        x = self.embedding(x_t)
        condition = None
        if self.time_in is not None:
            width = self.time_in.in_features
            condition = jax.nn.silu(self.time_in(time_embedding(t, width))).astype(x.dtype)
        for block in self.blocks:
            x = block(x, condition, segment_ids)
        x = self.norm(x)
        logits = self.embedding.attend(x) if self.head is None else self.head(x)
        return logits.astype(jnp.float32)


def count_parameters(model: nnx.Module) -> int:
    """Number of trained numbers.

    >>> count_parameters(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    9
    """
    return sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
