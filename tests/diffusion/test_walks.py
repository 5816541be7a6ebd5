from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nanodlm
from nanodlm.build import make_model
from nanodlm.config import PRESETS
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.diffusion.blocks import Decoder
from nanodlm.diffusion.kinds import KINDS, KindName
from nanodlm.diffusion.sampling import reverse_process
from nanodlm.diffusion.walks import State, Walk, step_by_step, to_end
from nanodlm.model.transformer import Transformer

LENGTH, MASK = 10, 9
OFTEN = {"ancestral", "first_hitting", "threshold", "remdm_conf"}
WAYS = [
    pytest.param(kind, sampler, marks=() if sampler in OFTEN else pytest.mark.slow)
    for kind, traits in KINDS.items()
    for sampler in traits.samplers
]
PROMPT = np.full((3, LENGTH), MASK, np.int32)
PROMPT[1, :5], PROMPT[2, ::2] = [1, 2, 3, 4, 5], 6  # in the front, beyond a first block; and here and there


def network(kind: KindName, seed: int = 0) -> Transformer:
    shape = {"seq_len": 12, "n_layers": 1, "n_heads": 2, "d_model": 8, "d_ff": 8, "zero_init": False}
    settings = PRESETS["demo"].replace(objective={"kind": kind, "block_size": 4}, model={**shape, "init_seed": seed})
    return make_model(settings, Vocabulary(MASK, MASK - 1))


def options_of(kind: KindName, sampler: str) -> dict[str, Any]:
    return {} if kind == "autoregressive" else {"sampler": sampler, "num_steps": 4, "remask": 0.3}


@pytest.mark.parametrize(("kind", "sampler"), WAYS)
def test_a_text_that_is_watched_ends_as_the_one_that_is_drawn(kind: KindName, sampler: str) -> None:
    model, how = network(kind), options_of(kind, sampler)
    walk_of = lambda key, prompt: reverse_process(model, key, shape=PROMPT.shape, prompt=prompt, **how)  # noqa: E731
    seen = list(step_by_step(walk_of)(jax.random.key(3), PROMPT))
    drawn = nanodlm.sample(model, 3, shape=PROMPT.shape, prompt=PROMPT, **how)
    np.testing.assert_array_equal(seen[-1].tokens, drawn)
    assert [int(state.step) for state in seen] == list(range(len(seen)))
    for state in seen:
        tokens, confidence = np.asarray(state.tokens), np.asarray(state.confidence)
        np.testing.assert_array_equal(tokens[PROMPT != MASK], PROMPT[PROMPT != MASK])
        assert (confidence[PROMPT != MASK] == 1).all()
        assert ((confidence == 0) == (tokens == MASK)).all() or (kind == "uniform" and state.step == 0)
        assert (confidence <= 1).all()
    if sampler.startswith("remdm") or KINDS[kind].random_tokens:
        return
    for before, after in pairwise(seen):
        known = np.asarray(before.tokens) != MASK
        np.testing.assert_array_equal(after.tokens[known], before.tokens[known])
        np.testing.assert_array_equal(after.confidence[known], before.confidence[known])
        assert after.calls > before.calls


def test_a_step_is_compiled_once_for_other_parameters_keys_and_prompts() -> None:
    traced: list[int] = []
    graphdef = nnx.graphdef(network("absorbing"))

    def walk_of(params: Any, key: jax.Array, prompt: jax.Array) -> Walk:
        traced.append(1)
        return reverse_process(nnx.merge(graphdef, params), key, shape=PROMPT.shape, prompt=prompt, num_steps=3)

    steps, draw = step_by_step(walk_of), jax.jit(lambda *given: to_end(walk_of(*given)))
    for seed, prompt in ((0, PROMPT), (1, PROMPT[::-1])):
        params = nnx.state(network("absorbing", seed))
        *_, last = steps(params, jax.random.key(seed), prompt)
        jax.tree.map(np.testing.assert_array_equal, last, draw(params, jax.random.key(seed), prompt))
    assert len(traced) == 3  # the start, the step, and the loop


def test_the_confidence_of_a_token_is_its_probability_when_it_was_drawn() -> None:
    p = jnp.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    ways: list[dict[str, Any]] = [{"sampler": "first_hitting"}, {"temperature": 0.5}, {"uniform_share": 1.0}]
    for how in ways:
        walk = reverse_process(
            lambda x_t, t: jnp.log(jnp.broadcast_to(p, (len(x_t), 2, 3))), 0, shape=(50, 2), mask_id=3,
            schedule="linear", **how,
        )  # fmt: skip
        end = jax.jit(partial(to_end, walk))()
        np.testing.assert_allclose(end.confidence, np.asarray(p)[[0, 1], end.tokens], rtol=1e-5)
        assert end.calls == 2


def states_of(model: Transformer, prompt: np.ndarray, **how: Any) -> list[State]:
    return list(step_by_step(lambda: reverse_process(model, 0, shape=prompt.shape, prompt=prompt, **how))())


def test_calls_are_counted_those_with_guidance_and_those_that_read_blocks() -> None:
    guided = states_of(network("absorbing"), PROMPT, num_steps=3, guidance=1.0)
    assert [int(state.calls) for state in guided] == [0, 2, 4, 6]
    block = np.full((1, 12), MASK, np.int32)
    block[0, :6] = 1  # a block that is given is read, the next has two masks, the last is not read
    states = states_of(network("block"), block, sampler="first_hitting")
    assert [int(state.calls) for state in states] == [1, 2, 4, 5, 6, 7, 8]
    assert [int((state.tokens == MASK).sum()) for state in states] == [6, 5, 4, 3, 2, 1, 0]
    assert [int(state.calls) for state in states_of(network("autoregressive"), block)] == list(range(13))


def test_a_prompt_without_masks_takes_no_step() -> None:
    for kind in KINDS:
        states = states_of(network(kind), np.ones((2, 4), np.int32), num_steps=3)
        assert [state.tokens.tolist() for state in states] == [[[1] * 4] * 2]


def uncached(model: Transformer, text: jax.Array, size: int) -> Decoder:
    """The decoder that `row_decoder` is near to: it reads the whole row each time."""

    def put(cache: Any, block: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(cache[0], block, (0, cache[1] * size))

    def denoise(cache: Any, block: jax.Array, t: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(model(put(cache, block), t), cache[1] * size, size, axis=1)

    extend = lambda cache, block: (model(cache[0], jnp.ones(len(block))), (put(cache, block), cache[1] + 1))  # noqa: E731
    return Decoder(lambda rows: (text, jnp.int32(0)), extend, denoise)


@pytest.mark.parametrize(
    ("cache_block", "steps"), [(5, 2), *(pytest.param(*of, marks=pytest.mark.slow) for of in ((LENGTH, 4), (2, 5)))]
)
def test_a_cache_that_is_made_anew_for_each_step_changes_no_token(cache_block: int, steps: int) -> None:
    model, key = network("absorbing", 5), jax.random.key(1)
    how = {"num_steps": steps, "sampler": "ancestral_skip"}
    cached = nanodlm.sample(model, key, shape=PROMPT.shape, prompt=PROMPT, cache_block=cache_block, **how)
    if cache_block == LENGTH:  # the whole is one block, of which nothing is outside
        plain = nanodlm.sample(model, jax.random.fold_in(key, 0), shape=PROMPT.shape, prompt=PROMPT, **how)
    else:  # one step for each block
        named = {"mask_id": MASK, "schedule": "linear", "block_size": cache_block, "num_steps": 1}
        decoder = uncached(model, jnp.asarray(PROMPT), cache_block)
        plain = nanodlm.sample_blocks(decoder, key, shape=PROMPT.shape, prompt=PROMPT, **named)
    np.testing.assert_array_equal(cached, plain)
    assert (cached[PROMPT == MASK] < MASK).all()


def test_with_a_cache_blocks_appear_in_turn_and_the_whole_is_read_between_them() -> None:
    pattern = np.full((1, 10), MASK, np.int32)
    pattern[0, 7:] = 3
    states = states_of(network("absorbing"), pattern, cache_block=5, sampler="first_hitting")
    masks = [(np.asarray(state.tokens[0]) == MASK) for state in states]
    assert [(int(m[:5].sum()), int(m[5:].sum())) for m in masks] == [
        (5, 2), (4, 2), (3, 2), (2, 2), (1, 2), (0, 2), (0, 1), (0, 0),
    ]  # fmt: skip
    assert [int(state.calls) for state in states] == [1, 2, 3, 4, 5, 7, 8, 9]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("absorbing", {"cache_block": 3}, "the length 10 is no multiple of cache_block 3"),
        ("absorbing", {"cache_block": 5, "guidance": 1.0}, "choose cache_block 0"),
        ("uniform", {"cache_block": 5}, "the cache is for masks alone"),
        ("block", {"cache_block": 5}, "a network of blocks has a cache of its own"),
        ("absorbing", {"cache_block": -5}, "cache_block must be at least 1, not -5"),
    ],
)
def test_a_cache_is_refused_where_it_has_no_meaning(kind: KindName, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nanodlm.sample(network(kind), 0, shape=(1, LENGTH), **options)
    with pytest.raises(ValueError, match="has a cache: choose cache_block 0"):
        nanodlm.sample(lambda x, t: t, 0, shape=(1, 4), cache_block=2, mask_id=2, schedule="linear")


def test_a_step_is_compiled_once_for_a_network_that_was_loaded(caplog: pytest.LogCaptureFixture) -> None:
    graphdef, params = nnx.split(network("absorbing"))
    loaded = jax.device_put(params, jax.devices()[0])  # as checkpoints are restored to where they say

    def walk_of(params: Any, key: jax.Array) -> Walk:
        model = nnx.merge(graphdef, params)
        return reverse_process(model, key, shape=(2, LENGTH), sampler="ancestral", num_steps=3)

    with jax.log_compiles():
        for _ in step_by_step(walk_of)(loaded, jax.random.key(0)):
            pass
    assert caplog.text.count("Finished XLA compilation of jit(step)") == 1
