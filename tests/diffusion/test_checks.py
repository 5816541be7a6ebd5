"""What the public functions refuse in one line, and what they do when the network's logits are not finite."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nanodlm
from nanodlm.build import make_model
from nanodlm.config import PRESETS
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.diffusion.blocks import reverse_blocks, reverse_tokens
from nanodlm.diffusion.kinds import KINDS, SAMPLERS, KindName
from nanodlm.diffusion.sampling import reverse_process
from nanodlm.diffusion.walks import Walk, step_by_step, to_end
from nanodlm.model.transformer import Transformer

KEY, X_0 = jax.random.key(0), jnp.zeros((3, 4), int)


def even(x_t: jax.Array, t: jax.Array) -> jax.Array:
    """Two tokens and a mask, all alike."""
    return jnp.zeros((*x_t.shape, 3))


DECODER = nanodlm.Decoder(lambda rows: 0, lambda cache, x: (even(x, x), cache), lambda cache, x, t: even(x, t))
SHORT: dict[str, Any] = {"shape": (2, 4), "mask_id": 2}
LONG: dict[str, Any] = {**SHORT, "block_size": 2, "schedule": "linear"}


def nelbo(denoise: Any = even, x_0: Any = X_0, key: Any = KEY, **options: Any) -> jax.Array:
    return nanodlm.nelbo(denoise, x_0, key, **{"schedule": "linear", "mask_id": 2, **options})


def sample(denoise: Any = even, key: Any = KEY, **options: Any) -> jax.Array:
    return nanodlm.sample(denoise, key, **{"shape": (3, 4), "schedule": "linear", "mask_id": 2, **options})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(nelbo, lambda x_t, t: even(x_t[:1], t)), r"logits of shape \(1, 4, 3\) for ids of shape \(3, 4\)"),
        (partial(nelbo, lambda x_t, t: even(x_t[:, :1], t)), r"logits of shape \(3, 1, 3\) for ids of shape \(3, 4\)"),
        (partial(sample, lambda x_t, t: even(x_t[:1], t)), r"logits of shape \(1, 4, 3\) for ids of shape \(3, 4\)"),
        (partial(nelbo, x_0=X_0.at[0, 0].set(-100)), "x_0 holds the id -100: ids begin at 0"),
        (partial(nelbo, x_0=np.array([[2**40]])), "x_0 holds the id 1099511627776: ids fit into 32 bits"),
        (partial(nelbo, x_0=[[0, 2**40]]), "x_0 holds an id that does not fit into 32 bits"),
        (partial(sample, prompt=np.array([2**40])), "the prompt holds the id 1099511627776: ids fit into 32 bits"),
        (partial(nelbo, x_0=np.array([[2**64 - 1]], np.uint64)), "x_0 holds the id 18446744073709551615"),
        (partial(nelbo, x_0=[[2**70]]), "x_0 holds an id that does not fit into 32 bits"),
        (partial(nelbo, x_0=[[0, 1], [1]]), "x_0 is one row of token ids, or several of one length"),
        (partial(nelbo, x_0=jnp.zeros((2, 3))), r"not float32 of shape \(2, 3\)"),
        (partial(nelbo, x_0=jnp.zeros((0, 8), int)), "at least one"),
        (partial(nelbo, lambda x, t: jnp.zeros((*x.shape, 9)), x_0=[[1, 5, 7]]), "above the mask, 2, from 5 to 7"),
        (partial(nelbo, mask_id=0), "mask_id must be at least 1, not 0"),
        (partial(nelbo, mask_id=-1), "mask_id must be at least 1, not -1"),
        (partial(nelbo, mask_id=4), "scores 3 ids cannot have 4 as its mask"),
        (partial(nelbo, mask_id=None), "pass mask_id: only a network of nanodlm.load carries its own"),
        (partial(nelbo, schedule="lineal"), "unknown schedule 'lineal': choose one of linear"),
        (partial(nanodlm.make_schedule, "poly", exponent=float("nan")), "must be positive, not nan"),
        (partial(sample, prompt=[0, 5]), "the prompt holds the id 5, which is beyond that of the mask, 2"),
        (partial(sample, prompt=[-1]), "the prompt holds the id -1"),
        (partial(nelbo, x_0=[[1, 3]]), "x_0 holds the id 3: the network scores ids up to 2"),
        (partial(nanodlm.sample_blocks, DECODER, KEY, **LONG, num_steps=1, prompt=[3]), "the prompt holds the id 3"),
        (partial(nanodlm.sample_blocks, DECODER, KEY, **LONG, num_steps=1, prompt=[-1]), "the prompt holds the id -1"),
        (partial(nanodlm.sample_autoregressive, DECODER, KEY, **SHORT, prompt=[3]), "the prompt holds the id 3"),
        (partial(nanodlm.sample_autoregressive, DECODER, KEY, **SHORT, prompt=[-1]), "the prompt holds the id -1"),
        (partial(sample, temperature=float("nan")), "temperature must be finite and not negative, not nan"),
        (partial(sample, shape=(0, 4)), "the rows of the shape must be at least 1, not 0"),
    ],
)
def test_what_has_no_meaning_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_types_that_have_no_meaning_are_refused_too() -> None:
    program = """
import jax, nanodlm
even = lambda x_t, t: jax.numpy.zeros((*x_t.shape, 3))
known = {"schedule": "linear", "mask_id": 2}
for call in (
    lambda: nanodlm.nelbo(even, [[0, 1]], "3", **known),
    lambda: nanodlm.nelbo(even, [[0, 1]], 3, num_timesteps=2.5, **known),
    lambda: nanodlm.sample(even, 3, shape=(1, 2), num_steps=2.5, **known),
    lambda: nanodlm.sample(even, 3, shape=(1, 2), top_k=1.5, **known),
    lambda: nanodlm.sample(even, 3, shape=(4,), **known),
):
    try:
        print(call())
    except ValueError as error:
        print(error)
"""  # in a process of its own, in which annotations are not checked
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "the key must be jax.random.key(seed), or a seed, not str",
        "num_timesteps must be a whole number, not 2.5",
        "num_steps must be a whole number, not 2.5",
        "top_k must be a whole number, not 1.5",
        "the shape must be (rows, length), not (4,)",
    ]


def test_lists_names_and_seeds_stand_for_arrays_schedules_and_keys() -> None:
    usual = nelbo(x_0=jnp.array([[0, 1, 0]]), schedule=nanodlm.make_schedule("cosine"), key=jax.random.key(7))
    np.testing.assert_array_equal(nelbo(x_0=[[0, 1, 0]], schedule="cosine", key=7), usual)
    drawn = sample(key=jax.random.key(7), prompt=jnp.array([1, 0]), num_steps=4)
    np.testing.assert_array_equal(sample(key=7, prompt=[1, 0]), drawn)  # by default one step for each position


def test_ids_below_zero_that_are_not_known_when_traced_give_nan_for_their_row() -> None:
    nats = jax.jit(lambda x_0: nelbo(x_0=x_0))(X_0.at[1, 2].set(-1))
    assert jnp.isnan(nats).tolist() == [False, True, False]


@pytest.mark.parametrize(("sampler", "bad"), [*((name, jnp.nan) for name in SAMPLERS), ("ancestral", jnp.inf)])
def test_logits_that_are_not_finite_end_every_sampler_and_are_told(sampler: str, bad: float) -> None:
    def broken(x_t: jax.Array, t: jax.Array) -> jax.Array:
        return even(x_t, t).at[0, 0].set(bad)

    drawn = jax.jit(lambda key: sample(broken, key, sampler=sampler, num_steps=3))(KEY)
    assert drawn[0, 0] == -1
    assert ((drawn[1:] >= 0) & (drawn[1:] < 2)).all()


@pytest.mark.parametrize("sampler", [*SAMPLERS, "uniform", "hybrid", "guided"])
def test_logits_that_are_not_finite_end_a_text_at_once(sampler: str) -> None:
    mixed: dict[str, Any] = {"uniform": {"uniform_share": 1.0}, "hybrid": {"uniform_share": 0.5}}
    how = mixed.get(sampler, {"guidance": 1.0, "prompt": [0]} if sampler == "guided" else {"sampler": sampler})

    def walk_of(bad: jax.Array, since: jax.Array) -> Walk:
        def broken(x_t: jax.Array, t: jax.Array) -> jax.Array:
            return even(x_t, t).at[:, :, 0].set(jnp.where(t.max() <= since, bad, 0.0))  # of one token

        return reverse_process(broken, KEY, shape=(3, 4), mask_id=2, schedule="linear", num_steps=6, **how)

    steps, draw = step_by_step(walk_of), jax.jit(lambda *given: to_end(walk_of(*given)))
    for bad in (jnp.nan, jnp.inf):
        for since in (1.0, 0.9):  # from the first call on, and from within
            seen = []
            with pytest.raises(ValueError, match="logits that are not finite"):
                for state in steps(bad, since):
                    seen.append(state)
            assert (len(seen) == 1) == (since == 1)
            ended = draw(bad, since)
            assert ended.step == len(seen)
            assert ((ended.tokens == -1).any(axis=1) & (ended.tokens != 2).all(axis=1)).all()


@pytest.mark.parametrize("since", [0, 2])
def test_decoders_with_logits_that_are_not_finite_end_a_text_at_once(since: int) -> None:
    logits = lambda n, x: even(x, x) + jnp.where(n >= since, jnp.nan, 0.0)  # noqa: E731
    decoder = nanodlm.Decoder(lambda rows: 0, lambda n, x: (logits(n, x), n + 1), lambda n, x, t: logits(n, x))
    text = to_end(reverse_tokens(decoder, KEY, shape=(2, 6), mask_id=2))
    assert (text.tokens[:, since:] == -1).all()
    assert text.calls == since + 1
    text = to_end(reverse_blocks(decoder, KEY, shape=(2, 8), block_size=2, num_steps=1, mask_id=2, schedule="linear"))
    assert (text.tokens[:, 2 * since :] == -1).all()
    assert text.calls == 2 * since + 1


def test_a_prompt_that_is_out_of_range_when_compiled_ends_its_row() -> None:
    drawn = jax.jit(lambda prompt: sample(prompt=prompt, num_steps=3))(jnp.array([[0, 3], [-5, 1], [1, 1]]))
    assert (drawn < 0).any(axis=1).tolist() == [True, True, False]


def test_where_no_token_is_possible_the_caller_is_told() -> None:
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="logits that are not finite"):
            sample(lambda x_t, t: even(x_t, t) - jnp.inf, temperature=temperature, num_steps=1)


def test_mixed_noise_and_decoders_tell_of_logits_that_are_not_finite() -> None:
    def broken(x_t: jax.Array, t: jax.Array) -> jax.Array:
        return even(x_t, t).at[0, 0, 0].set(jnp.where(t[0] > 0.5, jnp.nan, 0.0))  # at first, and then no more

    with pytest.raises(ValueError, match="logits that are not finite"):
        sample(broken, uniform_share=1.0)
    extend = lambda cache, x: (even(x, x).at[0].set(jnp.nan), cache)  # noqa: E731
    decoder = nanodlm.Decoder(lambda rows: 0, extend, lambda cache, x, t: even(x, t).at[0].set(jnp.nan))
    with pytest.raises(ValueError, match="logits that are not finite"):
        nanodlm.sample_autoregressive(decoder, KEY, shape=(2, 3), mask_id=2)
    with pytest.raises(ValueError, match="logits that are not finite"):
        nanodlm.sample_blocks(decoder, KEY, shape=(2, 4), block_size=2, num_steps=2, mask_id=2, schedule="linear")


def network(kind: KindName, **model: Any) -> Transformer:
    """A small network that carries its objective."""
    small = {"seq_len": 8, "n_layers": 1, "n_heads": 2, "d_model": 16, "d_ff": 32, "zero_init": False, **model}
    return make_model(PRESETS["demo"].replace(objective={"kind": kind, "block_size": 4}, model=small), Vocabulary(9, 8))


@pytest.mark.parametrize("kind", get_args(KindName))
def test_a_loaded_network_is_scored_and_sampled_as_it_was_trained(kind: KindName) -> None:
    model = network(kind)
    drawn = nanodlm.sample(model, 0, shape=(2, 7))
    assert drawn.shape == (2, 7)
    assert (drawn < 9).all()
    named = {"schedule": "linear", "mask_id": 9, "objective": kind, "block_size": 4}
    alone = nanodlm.nelbo(model, drawn[:, :4], 1, estimator="count")
    np.testing.assert_array_equal(nanodlm.nelbo(model, drawn[:, :4], 1, estimator="count", **named), alone)
    with pytest.raises(ValueError, match="mask_id 8 contradicts the network, which was trained with 9"):
        nanodlm.nelbo(model, drawn[:, :4], 1, mask_id=8, estimator="count")
    with pytest.raises(ValueError, match="mask_id 8 contradicts the network, which was trained with 9"):
        nanodlm.sample(model, 0, shape=(2, 4), mask_id=8)
    other = "uniform" if kind != "uniform" else "absorbing"
    with pytest.raises(ValueError, match=f"kind {other} contradicts the network, which was trained with {kind}"):
        nanodlm.nelbo(model, drawn[:, :4], 1, objective=other, estimator="count")


def test_a_prompt_must_fit_the_text_and_options_must_exist_for_every_kind() -> None:
    block, before = network("block"), network("autoregressive")
    with pytest.raises(ValueError, match=r"a prompt of shape \(1, 6\) does not fit sequences of shape \(1, 5\)"):
        nanodlm.sample(block, 0, shape=(1, 5), prompt=[1] * 6)
    for model in (block, before):
        with pytest.raises(ValueError, match="sample has no option temprature"):
            nanodlm.sample(model, 0, shape=(1, 4), temprature=0.1)
        with pytest.raises(ValueError, match="num_steps must be at least 1, not 0"):
            nanodlm.sample(model, 0, shape=(1, 4), num_steps=0)


def test_segments_that_are_bound_already_stay() -> None:
    model, x_0 = network("absorbing"), jnp.array([[1, 2, 3, 4, 10, 10, 10, 10]])
    bound = partial(model.__call__, segment_ids=jnp.array([[0, 1, 2, 3, 4, 4, 4, 4]]))
    named = {"key": 0, "estimator": "count", "mask_id": 9, "schedule": "linear"}
    given = nanodlm.nelbo(model, x_0, segment_ids=jnp.array([[0, 1, 2, 3, 4, 4, 4, 4]]), **named)
    np.testing.assert_allclose(nanodlm.nelbo(bound, x_0, **named), given, rtol=1e-5)


def test_a_uniform_network_is_not_sampled_as_if_it_had_masks() -> None:
    model = network("uniform")
    given = {"shape": (2, 6), "num_steps": 4}
    explicit = nanodlm.sample(model, 0, uniform_share=1.0, **given)
    np.testing.assert_array_equal(nanodlm.sample(model, 0, **given), explicit)
    with pytest.raises(ValueError, match="contradicts the network"):
        nanodlm.sample(model, 0, uniform_share=0.5, **given)


def test_networks_of_one_kind_are_refused_by_the_samplers_of_another() -> None:
    block, before, masked = (network(kind) for kind in ("block", "autoregressive", "absorbing"))
    decoders = {m: nanodlm.Decoder(partial(m.new_cache, window=4), m.extend, m.denoise_block) for m in (block, before)}
    with pytest.raises(ValueError, match="trained as autoregressive"):
        nanodlm.sample_blocks(decoders[before], 0, shape=(1, 4), num_steps=2)
    with pytest.raises(ValueError, match="trained as block"):
        nanodlm.sample_autoregressive(decoders[block], 0, shape=(1, 4))
    with pytest.raises(ValueError, match="trained as absorbing"):
        nanodlm.sample_blocks(nanodlm.Decoder(masked.new_cache, masked.extend, even), 0, shape=(1, 4), num_steps=2)


def test_another_schedule_is_refused_where_the_network_is_told_the_time() -> None:
    blind, timed = network("absorbing"), network("absorbing", time_conditioning=True)
    nanodlm.sample(blind, 0, shape=(1, 4), schedule="cosine")
    nanodlm.sample(timed, 0, shape=(1, 4), schedule="linear")
    with pytest.raises(ValueError, match="a cosine schedule: the network is told the times of linear"):
        nanodlm.sample(timed, 0, shape=(1, 4), schedule="cosine")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "uniform"])
def test_padding_changes_nothing_for_the_tokens_beside_it(kind: KindName) -> None:
    model = network(kind)
    x_0 = jnp.array([[1, 2, 3, 4, 10, 10, 10, 10]] * 6)
    other = x_0.at[:, 4:].set(jnp.array([9, 11, 11, 9]))
    score = partial(nanodlm.nelbo, model, key=0, estimator="count")
    np.testing.assert_allclose(score(x_0), score(other), rtol=1e-5)
    np.testing.assert_allclose(jax.jit(score)(x_0), score(x_0), rtol=1e-5)


def score(x_0: Any, slope: Any = 1.0, dtype: Any = jnp.float32) -> jax.Array:
    """The bound of rows under logits that rise with the token, by the count form, with one key."""
    return nelbo(lambda x_t, t: even(x_t, t).astype(dtype) + jnp.arange(3, dtype=dtype) * slope, x_0, estimator="count")


def test_scoring_and_sampling_go_through_jit_vmap_and_grad() -> None:
    usual = score(X_0)
    np.testing.assert_allclose(jax.jit(score)(X_0), usual, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(score)(jnp.stack([X_0] * 2))[1], usual, rtol=1e-6)
    step = 1e-2
    slope = (score(X_0, 1 + step).sum() - score(X_0, 1 - step).sum()) / (2 * step)
    np.testing.assert_allclose(jax.grad(lambda s: score(X_0, s).sum())(1.0), slope, rtol=1e-3)
    keys = jax.random.split(KEY, 3)
    drawn = jax.vmap(lambda key: sample(key=key, num_steps=3))(keys)
    np.testing.assert_array_equal(drawn[2], sample(key=keys[2], num_steps=3))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32"])
def test_ids_of_every_type_are_scored_alike(dtype: str) -> None:
    np.testing.assert_array_equal(score(X_0.astype(dtype)), score(X_0))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_logits_of_every_type_are_scored_in_float32_and_sampled_down_to_the_least_temperature(dtype: Any) -> None:
    assert score(X_0, dtype=dtype).dtype == jnp.float32
    np.testing.assert_allclose(score(X_0, dtype=dtype), score(X_0), rtol=1e-6)
    rising = lambda x_t, t: even(x_t, t).astype(dtype) + jnp.arange(3, dtype=dtype)  # noqa: E731
    for temperature in (1e-45, 0.0):
        assert (sample(rising, temperature=temperature, num_steps=3) == 1).all()


def test_with_64_bits_the_numbers_are_the_same() -> None:
    usual = score(X_0)
    with jax.enable_x64(True):
        np.testing.assert_allclose(score(X_0), usual, rtol=1e-5)
        assert sample(num_steps=3).dtype == jnp.int32
