"""Sampling block by block, and token by token, with a cache of what was written before."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nanodlm.diffusion.checks import Rows, Seed, check_logits, finite_tokens, random_key, require, require_whole
from nanodlm.diffusion.cross_entropy import predictable
from nanodlm.diffusion.noise import Tokens
from nanodlm.diffusion.objective import own_objective, settle
from nanodlm.diffusion.schedules import Schedule
from nanodlm.diffusion.steps import reverse_rows
from nanodlm.diffusion.tokens import _categorical, _start, limited, probability
from nanodlm.diffusion.walks import State, Walk, any_sound, end_rows, start_of, to_end


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


def row_decoder(network: Any, text: Tokens, block_size: int, mask_id: int, schedule: Schedule) -> Decoder:
    """Return a decoder of a network that reads whole rows: of a text, its blocks are filled in in turn.

    Its cache is the text so far, what the layers kept of it when it was read last, and the number of the next block.
    The whole is read at the start and after each block; between, only the block is computed, of which those outside
    know nothing new: that is near the network's own law, not equal to it (`benchmarks.cache` measures how near). Blocks
    see later tokens of the prompt. The network is told the time at which as much of the text is masked.
    """

    def time(row: Tokens) -> Float[Array, "B"]:
        return schedule.time_of((row == mask_id).mean(axis=1))

    def put(row: Tokens, block: Int[Array, "B b"], index: Int[Array, ""]) -> Tokens:
        return jax.lax.dynamic_update_slice(row, block, (0, index * block_size))

    def read(row: Tokens, index: Int[Array, ""]) -> tuple[Array, Any]:
        logits, past = network.read_row(row, time(row))
        return logits, (row, past, index)

    def denoise(cache: Any, block: Int[Array, "B b"], t: Float[Array, "B"]) -> Float[Array, "B b V"]:
        row, past, index = cache
        return network.denoise_within(past, block, time(put(row, block, index)), index * block_size)

    extend = lambda cache, block: read(put(cache[0], block, cache[2]), cache[2] + 1)  # noqa: E731
    return Decoder(lambda rows: read(text, jnp.int32(0))[1], extend, denoise)


def sample_blocks(decoder: Decoder, key: Seed, *, shape: tuple[int, int], **options: Any) -> Tokens:
    """Draw sequences block by block, each by `sample` given the ones before; a block without masks costs no steps.

    The options are those of `reverse_blocks`. All else, what raises too, is as for `sample`.

    >>> from nanodlm.diffusion.schedules import make_schedule
    >>> count = Decoder(lambda rows: 0, lambda n, x: (jnp.zeros((*x.shape, 9)), n + 1),
    ...                 lambda n, x, t: 50 * jax.nn.one_hot(jnp.full(x.shape, n), 9))
    >>> sample_blocks(count, jax.random.key(0), shape=(1, 6), block_size=2, mask_id=8,
    ...               schedule=make_schedule("linear"), num_steps=1, prompt=jnp.array([7])).tolist()
    [[7, 0, 1, 1, 2, 2]]
    """
    return finite_tokens(to_end(reverse_blocks(decoder, key, shape=shape, **options)).tokens)


def sample_autoregressive(decoder: Decoder, key: Seed, *, shape: tuple[int, int], **options: Any) -> Tokens:
    """Draw sequences from left to right, one token per call of the network.

    The options are those of `reverse_tokens`. All else, what raises too, is as for `sample`.

    >>> after = Decoder(lambda rows: (), lambda c, x: (50 * jax.nn.one_hot((x + 1) % 9, 9), c), lambda c, x, t: x)
    >>> sample_autoregressive(after, jax.random.key(0), shape=(1, 5), mask_id=8, prompt=jnp.array([8, 8, 5])).tolist()
    [[0, 1, 5, 6, 7]]
    """
    return finite_tokens(to_end(reverse_tokens(decoder, key, shape=shape, **options)).tokens)


def reverse_blocks(
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
) -> Walk:
    """Return the walk that fills in the blocks of rows in turn, each given those before it; see `reverse_process`.

    Each block, of `block_size` tokens, takes `num_steps`; the text may end within the last one. What a prompt has
    masked there is filled in without sight of later blocks. Options are those of `steps.reverse_rows`, but there is no
    `guidance`, for the cache has seen the prompt. Source: BD3-LM, arXiv:2503.09573, section 3.
    """
    require(not options.pop("guidance", 0), "the cache of earlier blocks has seen the prompt: choose guidance 0")
    _require_kind(decoder, "block")
    known = settle(decoder.extend, schedule=schedule, mask_id=mask_id, block_size=block_size)
    mask, size, key = known["mask_id"], known["block_size"], random_key(key)
    require_whole("block_size", size)
    options |= {"shape": (shape[0], size), "mask_id": mask, "schedule": known["schedule"], "num_steps": num_steps}
    text = _start(prompt, shape, mask)
    number = -(-shape[1] // size)
    beyond = ((0, 0), (0, number * size - shape[1]))
    blocks = jnp.pad(text, beyond, constant_values=mask).reshape(shape[0], -1, size).swapaxes(0, 1)

    def of_block(state: State) -> Walk:
        cache, index, _ = state.memory
        ended = (state.tokens < 0).any(axis=1, keepdims=True) & (blocks[index] == mask)
        prompt = jnp.where(ended, -1, blocks[index])
        return reverse_rows(partial(decoder.denoise, cache), jax.random.fold_in(key, index), prompt=prompt, **options)

    def is_whole(state: State) -> Bool[Array, ""]:
        _, index, block = state.memory
        return (index < number - 1) & ~of_block(state).more(block) & any_sound(state.tokens)

    def read(state: State) -> State:
        cache, index, block = state.memory
        state = state._replace(calls=state.calls + 1, memory=(decoder.extend(cache, block.tokens)[1], index + 1, block))
        return state._replace(memory=(*state.memory[:2], of_block(state).start))

    def body(state: State) -> State:
        cache, index, block = state.memory
        after = of_block(state).body(block)

        def put(row: Array, part: Array) -> Array:
            return jax.lax.dynamic_update_slice(jnp.pad(row, beyond), part, (0, index * size))[:, : shape[1]]

        tokens = end_rows(put(state.tokens, after.tokens), mask)
        calls = state.calls + after.calls - block.calls
        shown = State(state.step + 1, tokens, put(state.confidence, after.confidence), calls, (cache, index, after))
        return jax.lax.while_loop(is_whole, read, shown)

    start = start_of(end_rows(text, mask), text != mask, (decoder.init(shape[0]), jnp.int32(0), None))
    start = start._replace(memory=(*start.memory[:2], of_block(start).start))
    more = lambda state: any_sound(state.tokens) & of_block(state).more(state.memory[2])  # noqa: E731
    return Walk(jax.lax.while_loop(is_whole, read, start), more, body)


def reverse_tokens(
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
) -> Walk:
    """Return the walk from left to right, one token per call of the network; see `reverse_process`.

    The network reads `mask_id` as the begin token, then the tokens so far; its logits there are those of the next.
    Tokens of the prompt are kept, and what it has masked is drawn given what is left of it. Behind `document_end` the
    network is given the begin token again, as one that was trained on documents apart expects. The decoder has blocks
    of one token; its `denoise` is not called.
    """
    _require_kind(decoder, "before")
    own, key = own_objective(decoder.extend), random_key(key)
    mask: int = settle(decoder.extend, schedule="linear" if own is None else None, mask_id=mask_id)["mask_id"]

    def body(state: State) -> State:
        i, (cache, before) = state.step, state.memory
        logits, cache = decoder.extend(cache, before[:, None])
        logits = predictable(check_logits(logits, before[:, None])[:, 0], mask_id=mask)
        drawn = _categorical(key, i, jnp.arange(shape[0]), limited(logits, temperature, top_k, top_p))
        masked = state.tokens[:, i] == mask
        token = jnp.where(masked, drawn, state.tokens[:, i])
        confidence = jnp.where(masked, probability(logits, drawn), state.confidence[:, i])
        tokens = end_rows(state.tokens.at[:, i].set(token), mask)
        before = token if document_end is None else jnp.where(token == document_end, mask, token)
        return State(i + 1, tokens, state.confidence.at[:, i].set(confidence), state.calls + 1, (cache, before))

    text = _start(prompt, shape, mask)
    begin = (decoder.init(shape[0]), jnp.full(shape[0], mask, jnp.int32))
    start = start_of(end_rows(text, mask), text != mask, begin)
    return Walk(start, lambda state: (state.tokens == mask).any(), body)


def _require_kind(decoder: Decoder, reads: str) -> None:
    """Refuse a loaded network that reads other positions than a sampler lets it."""
    own = own_objective(decoder.extend)
    if own and own.traits.reads != reads:
        raise ValueError(f"the network was trained as {own.kind}: nanodlm.sample knows how to sample it")
