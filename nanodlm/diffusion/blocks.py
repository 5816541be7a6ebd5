"""Sampling block by block, and token by token, with a cache of what was written before."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from nanodlm.diffusion.cross_entropy import predictable
from nanodlm.diffusion.sampling import sample
from nanodlm.diffusion.schedules import Schedule
from nanodlm.diffusion.tokens import Prompt, _categorical, _require, _start, limited


class Decoder(NamedTuple):
    """Cached decoding with a network in which a block of tokens sees itself and what comes before it.

    Attributes:
        init: Number of rows -> an empty cache, a pytree.
        extend: A cache and n clean tokens, a multiple of the block size -> logits at their positions, and the cache
            with them in it.
        denoise: A cache, the noisy block that follows, and its time -> logits of the block.
    """

    init: Callable[[int], Any]
    extend: Callable[[Any, Int[Array, "B n"]], tuple[Float[Array, "B n V"], Any]]
    denoise: Callable[[Any, Int[Array, "B b"], Float[Array, "B"]], Float[Array, "B b V"]]


def sample_blocks(
    decoder: Decoder,
    key: Key[Array, ""],
    *,
    shape: tuple[int, int],
    block_size: int,
    mask_id: int,
    schedule: Schedule,
    num_steps: int,
    prompt: Prompt = None,
    **options: Any,
) -> Int[Array, "B L"]:
    """Draw sequences block by block, each by `sample` given the ones before; a block without masks costs no steps.

    Args:
        decoder: The network.
        key: Randomness.
        shape: (B, L) of the result, L a multiple of the block size.
        block_size: Tokens per block.
        mask_id: The id of a masked token.
        schedule: The noise schedule.
        num_steps: Steps per block.
        prompt: As for `sample`; what its blocks have masked is filled in without sight of later blocks.
        options: Those of `sample`, but for `guidance`: the cache has seen the prompt.

    Raises:
        ValueError: As `sample`, and for a length that is no multiple of the block size.

    Source: BD3-LM, arXiv:2503.09573, section 3.

    >>> from nanodlm.diffusion.schedules import make_schedule
    >>> count = Decoder(lambda rows: 0, lambda n, x: (jnp.zeros((*x.shape, 9)), n + 1),
    ...                 lambda n, x, t: 50 * jax.nn.one_hot(jnp.full(x.shape, n), 9))
    >>> sample_blocks(count, jax.random.key(0), shape=(1, 6), block_size=2, mask_id=8,
    ...               schedule=make_schedule("linear"), num_steps=1, prompt=jnp.array([7])).tolist()
    [[7, 0, 1, 1, 2, 2]]
    """
    _require(not options.get("guidance"), "the cache of earlier blocks has seen the prompt: choose guidance 0")
    whole = block_size >= 1 and shape[1] % block_size == 0
    _require(whole, f"the length {shape[1]} is no multiple of the block size {block_size}: choose one that divides it")
    n_blocks = shape[1] // block_size
    options |= {"shape": (shape[0], block_size), "mask_id": mask_id, "schedule": schedule, "num_steps": num_steps}
    blocks = _start(prompt, shape, mask_id).reshape(shape[0], n_blocks, block_size).swapaxes(0, 1)

    def step(cache: Any, inputs: tuple[Int[Array, ""], Int[Array, "B b"]]) -> tuple[Any, Int[Array, "B b"]]:
        index, block = inputs
        options["prompt"] = block
        draw = partial(sample, partial(decoder.denoise, cache), jax.random.fold_in(key, index), **options)
        block = jax.lax.cond((block == mask_id).any(), draw, lambda: block)
        return decoder.extend(cache, block)[1], block

    _, blocks = jax.lax.scan(step, decoder.init(shape[0]), (jnp.arange(n_blocks), blocks))
    return blocks.swapaxes(0, 1).reshape(shape)


def sample_autoregressive(
    decoder: Decoder,
    key: Key[Array, ""],
    *,
    shape: tuple[int, int],
    mask_id: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    prompt: Prompt = None,
    document_end: int | None = None,
) -> Int[Array, "B L"]:
    """Draw sequences from left to right, one token per call of the network.

    The network reads `mask_id` as the begin token, then the tokens so far; its logits there are those of the next.
    Tokens of the prompt are kept, and what it has masked is drawn given what is left of it.

    Args:
        decoder: The network, with blocks of one token; `denoise` is not called.
        key: Randomness.
        shape: (B, L) of the result.
        mask_id: The begin token; it and larger ids are never drawn.
        temperature: As for `sample`.
        top_k: As for `sample`.
        top_p: As for `sample`.
        prompt: As for `sample`.
        document_end: A token behind which the network is given the begin token, as one that was trained on documents
            apart expects.

    Raises:
        ValueError: As `sample`.

    >>> after = Decoder(lambda rows: (), lambda c, x: (50 * jax.nn.one_hot((x + 1) % 9, 9), c), lambda c, x, t: x)
    >>> sample_autoregressive(after, jax.random.key(0), shape=(1, 5), mask_id=8, prompt=jnp.array([8, 8, 5])).tolist()
    [[0, 1, 5, 6, 7]]
    """

    def step(state: tuple[Any, Int[Array, "B"]], inputs: tuple[Int[Array, ""], Int[Array, "B"]]) -> tuple[Any, Any]:
        (cache, before), (i, given) = state, inputs
        logits, cache = decoder.extend(cache, before[:, None])
        logits = limited(predictable(logits, mask_id=mask_id), temperature, top_k, top_p)
        token = jnp.where(given == mask_id, _categorical(key, i, logits)[:, 0], given)
        return (cache, token if document_end is None else jnp.where(token == document_end, mask_id, token)), token

    begin = (decoder.init(shape[0]), jnp.full(shape[0], mask_id, jnp.int32))
    return jax.lax.scan(step, begin, (jnp.arange(shape[1]), _start(prompt, shape, mask_id).T))[1].T
