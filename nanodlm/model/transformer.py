"""The network: a pre-norm transformer with RoPE and RMSNorm that predicts x_0 from x_t.

    model = Transformer(vocab_size=4096, n_layers=3, n_heads=4, d_model=128, d_ff=512, rngs=nnx.Rngs(0))
    logits = model(x_t, t)    # (B, L) ids, (B,) times -> (B, L, V) float32

It knows nothing of diffusion: the mask is one more token. It reads the whole row, or with a `block_size` only the
blocks up to a position's own, so that one network serves three kinds of language model:

    diffusion            block_size=0    model(x_t, t); sampling, nearly: read_row, denoise_within
    block diffusion      block_size=b    model(x_t, t, context=x_0); sampling: new_cache, extend, denoise_block
    autoregression       block_size=1    model(x_0, t) scores the next token; sampling: new_cache, extend
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from nanodlm.devices.mesh import constrain
from nanodlm.devices.products import product, together, wide
from nanodlm.model.layers import NORMAL, Block, time_embedding
from nanodlm.model.views import Cache, Past, View, view_behind, view_of_row, view_within

Ids = Int[Array, "B L"]
Logits = Float[Array, "B L V"]
Features = Float[Array, "B L D"]
Times = Float[Array, "B *K"]  # of each row, or of each of its K blocks
Remat = Literal["none", "dots", "full"]


class Transformer(nnx.Module):
    """Predict every token of a row from a noised one.

    A `block_size` changes what positions read, and no parameter. What a layer makes for the backward pass is kept, or
    computed again: with `remat` as `none` nothing, as `dots` all but matrix products, as `full` the whole.

    >>> model = Transformer(vocab_size=32, n_layers=1, n_heads=2, d_model=8, d_ff=16, rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((2, 5), int), jnp.ones(2)).shape
    (2, 5, 32)
    """

    objective: Any = None  # what it is trained on, a `diffusion.objective.Objective`, where it was made from settings
    seq_len: int = 0  # tokens in the rows it is trained on, likewise
    document_end: int | None = None  # the id that ends a document, where it is told
    padding: int | None = None  # the id that fills up rows, where they are, and which nothing else then reads
    sampling: Any = None  # how its run draws texts, a `config.SamplerConfig`, where it was made from settings

    def __init__(
        self,
        *,
        vocab_size: int,  # ids it embeds and scores: the tokenizer's, the mask, padding
        n_layers: int,
        n_heads: int,  # d_model / n_heads must be even
        d_model: int,  # width of the residual stream
        d_ff: int,  # width of the feed-forward layers (squared ReLU)
        conv_width: int = 0,  # of each block's depthwise convolution, odd; 0 is none
        time_conditioning: bool = False,  # whether blocks see the time t
        tie_embeddings: bool = False,  # whether the output layer is the embedding's transpose
        qk_norm: bool = True,  # of queries and keys (Source: arXiv:2302.05442, section 2.2, with RMSNorm)
        zero_init: bool = True,  # whether layers that write to the stream, and an untied output layer, start at zero
        block_size: int = 0,
        remat: Remat = "none",
        dtype: jnp.dtype | str = "float32",  # of matrix products; parameters and logits are float32
        rngs: nnx.Rngs,
    ):
        if block_size < 0:
            raise ValueError(f"block_size is {block_size}, but must be 0 (no blocks) or more")
        self.block_size, self.conv_width, self.n_layers, self.remat = block_size, conv_width, n_layers, remat
        self.dtype = compute = jnp.dtype(dtype)
        # As an output layer, a tied embedding must start with small logits.
        init = NORMAL(0.5 * d_model**-0.5 if tie_embeddings else 0.5)
        self.embedding = nnx.Embed(vocab_size, d_model, embedding_init=init, dtype=wide(compute), rngs=rngs)
        self.sees_time = time_conditioning
        self.time_in = nnx.Linear(d_model, d_model, rngs=rngs) if time_conditioning else None

        shape = {"n_heads": n_heads, "d_model": d_model, "d_ff": d_ff, "conv_width": conv_width}
        switches = {"time_conditioning": time_conditioning, "qk_norm": qk_norm, "zero_init": zero_init}

        @nnx.split_rngs(splits=n_layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(**shape, **switches, dtype=compute, rngs=rngs)

        self.blocks = stack(rngs)  # all layers' parameters, stacked along a first axis
        self.norm = nnx.RMSNorm(d_model, dtype=wide(compute), rngs=rngs)
        init = nnx.initializers.zeros_init() if zero_init else NORMAL(0.02)
        head = nnx.Embed(vocab_size, d_model, embedding_init=init, rngs=rngs)
        self.head = None if tie_embeddings else head

    def __call__(self, x_t: Ids, t: Times, segment_ids: Ids | None = None, context: Ids | None = None) -> Logits:
        """Return logits of x_0 at every position, in float32: the `features` times the `table`."""
        return self.score(self.features(x_t, t, segment_ids, context))

    @property
    def table(self) -> Float[Array, "V D"]:
        """The output layer, whose product with features are the logits."""
        return (self.head or self.embedding).embedding[...]

    def features(self, x_t: Ids, t: Times, segment_ids: Ids | None = None, context: Ids | None = None) -> Features:
        """Return what the output layer scores, at every position.

        With a context, each block of x_t is seen beside the context's blocks before it, and nothing else: one call
        scores every block of a row as if the ones before it were already known. That is the mask of block diffusion
        (Source: BD3-LM, arXiv:2503.09573, section 3.2 and the appendix on masks), in two passes: the context reads
        itself, block by block; then x_t reads the context. Both begin at position 0.

        Times are of each row, or of each of its K = ceil(L / block_size) blocks, and are read only with time
        conditioning; the context's is 0. Attention and convolution stay within a document, of `segment_ids`. A context
        without a block size, or another number of times, is a ValueError.
        """
        if context is not None and not self.block_size:
            raise ValueError("a context needs a network with a block_size above 0")
        view_of = partial(view_of_row, x_t.shape[1], segment_ids, self.block_size, self.conv_width)
        past, view = None, view_of()
        if context is not None:
            _, past = self._run(context, jnp.zeros_like(t, shape=t.shape[:1]), view, keep=True)
            view = view_of(beside_context=True)
        return self.norm(self._run(x_t, t, view, past)[0]).astype(self.dtype)

    def new_cache(self, rows: int, window: int) -> Cache:
        """Return an empty cache for so many rows, of which a block can read a window of positions before it.

        A network without a block size, or a window that is no multiple of it, is a ValueError.

        >>> shape = {"vocab_size": 32, "n_layers": 1, "n_heads": 2, "d_model": 8, "d_ff": 16}
        >>> model = Transformer(**shape, block_size=2, rngs=nnx.Rngs(0))
        >>> _, cache = model.extend(model.new_cache(rows=1, window=8), jnp.array([[5, 6, 7, 8]]))
        >>> int(cache.count), model.denoise_block(cache, jnp.array([[31, 31]]), jnp.ones(1)).shape
        (4, (1, 2, 32))
        """
        self._check_blocks(window, "the window")
        width, n_heads = self.embedding.features, self.blocks.n_heads
        heads = jnp.zeros((self.n_layers, rows, window, n_heads, width // n_heads), self.dtype)
        inputs = jnp.zeros((self.n_layers, rows, window, width if self.conv_width else 0), self.dtype)
        return Cache(Past(heads, heads, inputs), jnp.zeros((), jnp.int32))

    def extend(self, cache: Cache, tokens: Int[Array, "B N"]) -> tuple[Float[Array, "B N V"], Cache]:
        """Append clean tokens, at the positions count to count + N - 1; return their logits, and the cache with them.

        The logits are as `__call__` gives them for one stream at time 0, but that a block reads the window before it
        and no more. Any number of blocks at a time gives the same result; tokens that are not whole ones raise.
        """
        self._check_blocks(tokens.shape[1], "the number of tokens")
        view = view_behind(cache, tokens.shape[1], self.block_size, self.conv_width)
        x, made = self._run(tokens, jnp.zeros(len(tokens)), view, cache.layers, keep=True)
        window = cache.layers.keys.shape[2]
        layers = jax.tree.map(lambda old, new: jnp.concatenate([old, new], 2)[:, :, -window:], cache.layers, made)
        return self.score(self.norm(x)), Cache(layers, cache.count + tokens.shape[1])

    def denoise_block(self, cache: Cache, x_t: Int[Array, "B N"], t: Float[Array, "B"]) -> Float[Array, "B N V"]:
        """Return logits of x_0 for the one noisy block that follows the cached tokens, as `__call__` with a context."""
        if not self.block_size or x_t.shape[1] != self.block_size:
            raise ValueError(f"one block has {self.block_size} positions, not {x_t.shape[1]}")
        view = view_behind(cache, self.block_size, self.block_size, self.conv_width)
        return self.score(self.norm(self._run(x_t, t, view, cache.layers)[0]))

    def read_row(self, x_t: Ids, t: Float[Array, "B"]) -> tuple[Logits, Past]:
        """Return the logits of a whole noisy row, as `__call__` does, and what each layer keeps of it."""
        x, past = self._run(x_t, t, view_of_row(x_t.shape[1], None, 0, self.conv_width), keep=True)
        assert past is not None
        return self.score(self.norm(x)), past

    def denoise_within(self, past: Past, x_t: Ids, t: Float[Array, "B"], start: Int[Array, ""]) -> Logits:
        """Return logits of L positions of a row, from `start` on, beside what was kept of the others when it was read.

        If nothing has changed since, they are those of the whole row. If some of the L tokens have, they are near them:
        the others were read beside the former tokens. Source: Fast-dLLM, arXiv:2505.22618, section 3.2 (DualCache).
        """
        size, reach = x_t.shape[1], self.conv_width // 2
        view = view_within(start, size, past.keys.shape[2], self.conv_width)
        near = jnp.clip(start - reach + jnp.arange(size + 2 * reach), 0, past.keys.shape[2] - 1)
        past = past._replace(inputs=past.inputs[:, :, near])
        return self.score(self.norm(self._run(x_t, t, view, past)[0]))

    def _check_blocks(self, number: int, what: str) -> None:
        if not self.block_size:
            raise ValueError("a cache needs a network with a block_size above 0")
        if number < 1 or number % self.block_size:
            raise ValueError(f"{what} is {number}, but must be a multiple of the block size, {self.block_size}")

    def _run(
        self, ids: Int[Array, "B Q"], t: Times, view: View, past: Past | None = None, *, keep: bool = False
    ) -> tuple[Float[Array, "B Q D"], Past | None]:
        """Run all blocks over one stream; return it and, when asked to, what each layer keeps of it."""
        # Devices that share a table look up their part of each vector, for all of their rows, and exchange the parts.
        x = constrain(constrain(self.embedding(ids), "group", None, "embed"), "batch", None, None)
        condition = None
        if t.ndim == 1:
            t = t[:, None]
        else:
            size = self.block_size or ids.shape[1]
            if t.shape[1] != -(-ids.shape[1] // size):
                raise ValueError(f"{t.shape[1]} times for {ids.shape[1]} positions in blocks of {size}")
            t = jnp.repeat(t, size, axis=1)[:, : ids.shape[1]]
        if self.time_in is not None:
            embedded = time_embedding(t.reshape(-1), self.time_in.in_features)
            condition = jax.nn.silu(self.time_in(embedded)).reshape(*t.shape, -1).astype(x.dtype)
        graphdef, params = nnx.split(self.blocks)

        def layer(x: Float[Array, "B Q D"], inputs: tuple[Any, Past | None]) -> tuple[Array, Past | None]:
            x, kept = nnx.merge(graphdef, inputs[0])(x, view, condition, inputs[1])
            return constrain(x, "batch", None, None), kept if keep else None

        if self.remat != "none":
            dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            layer = jax.checkpoint(layer, policy=dots if self.remat == "dots" else None, prevent_cse=False)
        return jax.lax.scan(layer, x, (params, past), unroll=together())

    def score(self, features: Float[Array, "*N D"]) -> Float[Array, "*N V"]:
        """Return the logits of `features`, in float32."""
        flat: Array = product("nd,vd->nv", self.dtype, features.reshape(-1, features.shape[-1]), self.table)
        return flat.astype(jnp.float32).reshape(*features.shape[:-1], -1)


def segments(x_0: Ids, end_of_text: int | None, padding: int | None = None) -> Ids | None:
    """Number the documents of each row from 0, for each token; an end-of-text mark belongs to the one it ends.

    Padding has the number L. Without the id of marks a row is one document, without either there is nothing to tell.

    >>> segments(jnp.array([[5, 9, 6, 10]]), end_of_text=9, padding=10).tolist()
    [[0, 0, 1, 4]]
    """
    if end_of_text is None and padding is None:
        return None
    ends = (x_0 == (-1 if end_of_text is None else end_of_text)).astype(jnp.int32)
    numbers = jnp.cumsum(ends, axis=1) - ends
    return numbers if padding is None else jnp.where(x_0 == padding, x_0.shape[1], numbers)


def count_parameters(model: nnx.Module) -> int:
    """Count the trained numbers of a network."""
    return sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
