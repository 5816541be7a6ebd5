"""Sampling block by block, and token by token, with a cache of what was written before."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanodlm.diffusion.checks import Rows, Seed, check_logits, finite_tokens, random_key, require
from nanodlm.diffusion.cross_entropy import predictable
from nanodlm.diffusion.objective import own_objective, settle
from nanodlm.diffusion.schedules import Schedule
from nanodlm.diffusion.steps import draw_rows
from nanodlm.diffusion.tokens import _categorical, _start, limited


class Decoder(NamedTuple):
    """Cached decoding with a network in which a block of tokens sees itself and what comes before it.

    From a number of rows, `init` makes an empty cache, a pytree. From a cache and n clean tokens, a multiple of the
    block size, `extend` makes logits at their positions, and the cache with them in it. From a cache, the noisy block
    that follows and its time, `denoise` makes logits of the block.
    """

    init: Callable[[int], Any]
    extend: Callable[[Any, Int[Array, "B n"]], tuple[Float[Array, "B n V"], Any]]
    denoise: Callable[[Any, Int[Array, "B b"], Float[Array, "B"]], Float[Array, "B b V"]]


def cache_window(seq_len: int, block_size: int) -> int:
    """Return how many tokens before a block are read: whole blocks, no more than in training on so many tokens.

    >>> cache_window(64, 16), cache_window(64, 1)
    (48, 63)
    """
    return max(1, seq_len // max(1, block_size) - 1) * block_size


def decoder_of(network: Any) -> Decoder:
    """Return the decoder of a loaded network."""
    window = cache_window(network.seq_len, network.block_size)
    return Decoder(partial(network.new_cache, window=window), network.extend, network.denoise_block)


def sample_blocks(
    decoder: Decoder,
    key: Seed,
    *,
    shape: tuple[int, int],
    num_steps: int,
    block_size: int | None = None,
    mask_id: int | None = None,
    schedule: Schedule | str | None = None,
    prompt: Rows | None = None,
    **options: Any,
) -> Int[Array, "B L"]:
    """Draw sequences block by block, each by `sample` given the ones before; a block without masks costs no steps.

    Each block, of `block_size` tokens, takes `num_steps`. What a prompt has masked there is filled in without sight of
    later blocks. All else, what raises too, is as for `sample`, but there is no `guidance`, for the cache has seen the
    prompt, and a length that is no multiple of the block size is a ValueError.
    Source: BD3-LM, arXiv:2503.09573, section 3.

    >>> from nanodlm.diffusion.schedules import make_schedule
    >>> count = Decoder(lambda rows: 0, lambda n, x: (jnp.zeros((*x.shape, 9)), n + 1),
    ...                 lambda n, x, t: 50 * jax.nn.one_hot(jnp.full(x.shape, n), 9))
    >>> sample_blocks(count, jax.random.key(0), shape=(1, 6), block_size=2, mask_id=8,
    ...               schedule=make_schedule("linear"), num_steps=1, prompt=jnp.array([7])).tolist()
    [[7, 0, 1, 1, 2, 2]]
    """
    require(not options.pop("guidance", 0), "the cache of earlier blocks has seen the prompt: choose guidance 0")
    _require_kind(decoder, "block")
    known = settle(decoder.extend, schedule=schedule, mask_id=mask_id, block_size=block_size)
    mask, size, key = known["mask_id"], known["block_size"], random_key(key)
    whole = size and size >= 1 and shape[1] % size == 0
    require(whole, f"the length {shape[1]} is no multiple of the block size {size}: choose one that divides it")
    options |= {"shape": (shape[0], size), "mask_id": mask, "schedule": known["schedule"], "num_steps": num_steps}
    blocks = _start(prompt, shape, mask).reshape(shape[0], -1, size).swapaxes(0, 1)

    def step(cache: Any, inputs: tuple[Int[Array, ""], Int[Array, "B b"]]) -> tuple[Any, Int[Array, "B b"]]:
        index, block = inputs
        denoise = partial(decoder.denoise, cache)
        draw = partial(draw_rows, denoise, jax.random.fold_in(key, index), prompt=block, **options)
        block = jax.lax.cond((block == mask).any(), draw, lambda: block)
        return decoder.extend(cache, block)[1], block

    _, blocks = jax.lax.scan(step, decoder.init(shape[0]), (jnp.arange(len(blocks)), blocks))
    return finite_tokens(blocks.swapaxes(0, 1).reshape(shape))


def sample_autoregressive(
    decoder: Decoder,
    key: Seed,
    *,
    shape: tuple[int, int],
    mask_id: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    prompt: Rows | None = None,
    document_end: int | None = None,
) -> Int[Array, "B L"]:
    """Draw sequences from left to right, one token per call of the network.

    The network reads `mask_id` as the begin token, then the tokens so far; its logits there are those of the next.
    Tokens of the prompt are kept, and what it has masked is drawn given what is left of it. Behind `document_end` the
    network is given the begin token again, as one that was trained on documents apart expects. The decoder has blocks
    of one token; its `denoise` is not called. All else, what raises too, is as for `sample`.

    >>> after = Decoder(lambda rows: (), lambda c, x: (50 * jax.nn.one_hot((x + 1) % 9, 9), c), lambda c, x, t: x)
    >>> sample_autoregressive(after, jax.random.key(0), shape=(1, 5), mask_id=8, prompt=jnp.array([8, 8, 5])).tolist()
    [[0, 1, 5, 6, 7]]
    """
    _require_kind(decoder, "before")
    own, key = own_objective(decoder.extend), random_key(key)
    mask: int = settle(decoder.extend, schedule="linear" if own is None else None, mask_id=mask_id)["mask_id"]

    def step(state: tuple[Any, Int[Array, "B"]], inputs: tuple[Int[Array, ""], Int[Array, "B"]]) -> tuple[Any, Any]:
        (cache, before), (i, given) = state, inputs
        logits, cache = decoder.extend(cache, before[:, None])
        logits = predictable(check_logits(logits, before[:, None]), mask_id=mask)
        logits = limited(logits, temperature, top_k, top_p)
        token = jnp.where(given == mask, _categorical(key, i, logits)[:, 0], given)
        return (cache, token if document_end is None else jnp.where(token == document_end, mask, token)), token

    begin = (decoder.init(shape[0]), jnp.full(shape[0], mask, jnp.int32))
    _, tokens = jax.lax.scan(step, begin, (jnp.arange(shape[1]), _start(prompt, shape, mask).T))
    return finite_tokens(tokens.T)


def _require_kind(decoder: Decoder, reads: str) -> None:
    """Refuse a loaded network that reads other positions than a sampler lets it."""
    own = own_objective(decoder.extend)
    if own and own.traits.reads != reads:
        raise ValueError(f"the network was trained as {own.kind}: nanodlm.sample knows how to sample it")
