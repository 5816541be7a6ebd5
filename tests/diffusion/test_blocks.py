from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanodlm.diffusion.blocks import Decoder, sample_autoregressive, sample_blocks
from nanodlm.diffusion.noise import Denoise
from nanodlm.diffusion.schedules import make_schedule
from tests.support.laws import MASK_ID, VOCAB, Watched, assert_drawn_from, exact_denoiser, rough_table

LENGTH, ROWS = 4, 8000
TABLE = rough_table(LENGTH)
EXACT = exact_denoiser(TABLE)
KEY = jax.random.key(7)


def block_decoder(denoise: Denoise, length: int) -> Decoder:
    """Of a known law: the cache is the tokens so far, with masks behind them, and their number."""

    def put(cache: tuple[jax.Array, jax.Array], x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(cache[0], x, (0, cache[1]))

    def extend(cache: tuple[jax.Array, jax.Array], x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return jnp.zeros((*x.shape, VOCAB)), (put(cache, x), cache[1] + x.shape[1])

    def of_block(cache: tuple[jax.Array, jax.Array], x: jax.Array, t: jax.Array) -> jax.Array:
        logits = denoise(put(cache, x), t)
        return jax.lax.dynamic_slice_in_dim(logits, cache[1], x.shape[1], axis=1)

    return Decoder(lambda rows: (jnp.full((rows, length), MASK_ID), jnp.int32(0)), extend, of_block)


def token_decoder(denoise: Denoise, length: int) -> Decoder:
    """Of a known law, token by token after a begin token: the last token fed says what the logits are of the next."""
    blocks = block_decoder(denoise, length + 1)

    def extend(cache: tuple[jax.Array, jax.Array], x: jax.Array) -> tuple[jax.Array, Any]:
        _, cache = blocks.extend(cache, x)
        logits = denoise(cache[0][:, 1:], jnp.ones(len(x)))
        return jax.lax.dynamic_slice_in_dim(logits, cache[1] - 1, 1, axis=1), cache

    return Decoder(blocks.init, extend, blocks.denoise)


def draw_blocks(denoise: Denoise, rows: int, block_size: int, prompt: Any = None, **options: Any) -> np.ndarray:
    options = {"num_steps": 4, "sampler": "first_hitting", "schedule": make_schedule("linear")} | options
    run = partial(sample_blocks, block_decoder(denoise, LENGTH), shape=(rows, LENGTH), block_size=block_size)
    drawn = jax.jit(lambda key, prompt: run(key, mask_id=MASK_ID, prompt=prompt, **options))(KEY, prompt)
    jax.effects_barrier()
    return np.asarray(drawn)


def test_blocks_draw_from_the_law() -> None:
    assert_drawn_from(TABLE, draw_blocks(EXACT, ROWS, 2))


def test_blocks_keep_a_traced_prompt_fill_its_masks_and_skip_what_is_whole() -> None:
    watched = Watched(EXACT)
    prompt = jnp.asarray([[1, 2, MASK_ID], [0, 1, 2]])
    rows = draw_blocks(watched, 2, 2, prompt)
    np.testing.assert_array_equal(np.where(prompt == MASK_ID, MASK_ID, rows[:, :3]), prompt)
    assert rows.max() < MASK_ID
    assert len(watched.x) == 2  # the first block costs nothing, the second a call for each mask
    np.testing.assert_array_equal(watched.x[0], [[1, 2, MASK_ID, MASK_ID], [0, 1, 2, MASK_ID]])


def test_a_block_is_drawn_given_those_before_it() -> None:
    drawn = draw_blocks(EXACT, ROWS, 2, jnp.asarray([2, MASK_ID, MASK_ID, 1]))
    first = TABLE[2].sum(axis=(1, 2)) / TABLE[2].sum()  # without sight of the token given in the second block
    law = first[:, None] * TABLE[2, :, :, 1] / TABLE[2, :, :, 1].sum(axis=1, keepdims=True)
    assert_drawn_from(law, drawn[:, 1:3], 1.5)


def test_token_by_token_draws_from_the_law_and_keeps_the_prompt() -> None:
    run = partial(sample_autoregressive, token_decoder(EXACT, LENGTH), shape=(ROWS, LENGTH), mask_id=MASK_ID)
    assert_drawn_from(TABLE, np.asarray(jax.jit(run)(KEY)))
    prompt = jnp.asarray([MASK_ID, 2, MASK_ID])
    greedy = np.asarray(jax.jit(partial(run, temperature=0.0))(KEY, prompt=prompt))
    x_0 = TABLE.sum(axis=(1, 2, 3)).argmax()
    x_2 = TABLE[x_0, 2].sum(axis=1).argmax()
    np.testing.assert_array_equal(greedy, [[x_0, 2, x_2, TABLE[x_0, 2, x_2].argmax()]] * ROWS)
    cut = np.asarray(jax.jit(partial(run, top_k=1))(KEY))
    np.testing.assert_array_equal(cut, np.asarray(jax.jit(partial(run, temperature=0.0))(KEY)))


def test_blocks_refuse_guidance_and_sizes_without_meaning() -> None:
    with pytest.raises(ValueError, match="the cache of earlier blocks has seen the prompt: choose guidance 0"):
        draw_blocks(EXACT, 2, 2, guidance=1.0)
    with pytest.raises(ValueError, match="block_size must be at least 1, not 0"):
        draw_blocks(EXACT, 2, 0)
    with pytest.raises(ValueError, match="top_k must not be negative, not -2"):
        sample_autoregressive(token_decoder(EXACT, LENGTH), KEY, shape=(2, LENGTH), mask_id=MASK_ID, top_k=-2)


def test_a_document_end_is_followed_by_the_begin_token_where_documents_were_trained_apart() -> None:
    fed: list[int] = []

    def extend(cache: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        jax.debug.callback(lambda token: fed.append(int(token)), tokens[0, 0], ordered=True)
        return 50 * jax.nn.one_hot((cache + 1) % 3 * jnp.ones_like(tokens), VOCAB), cache + 1

    decoder = Decoder(lambda rows: jnp.int32(0), extend, lambda cache, x_t, t: jnp.zeros((*x_t.shape, VOCAB)))
    options = {"shape": (1, 5), "mask_id": MASK_ID}
    rows = [sample_autoregressive(decoder, KEY, document_end=end, **options).tolist() for end in (None, 2)]
    jax.effects_barrier()
    assert rows == [[[1, 2, 0, 1, 2]]] * 2
    assert fed == [MASK_ID, 1, 2, 0, 1, MASK_ID, 1, MASK_ID, 0, 1]
