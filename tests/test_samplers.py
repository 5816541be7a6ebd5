from functools import partial
from itertools import pairwise, product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanodlm.losses import Denoise
from nanodlm.samplers import sample
from nanodlm.schedules import KINDS, make_schedule
from tests.laws import FORBIDDEN_LOGIT, MASK_ID, TOKENS, VOCAB, exact_denoiser, markov_table, rough_table

pytestmark = pytest.mark.usefixtures("quick_compilation")

LENGTH = 4
TABLE = rough_table(LENGTH)
EXACT = exact_denoiser(TABLE)
CHAIN = exact_denoiser(markov_table(8))
STEPS, ROWS = 64, 8000
KEY = jax.random.key(7)


SCHEDULES = {kind: make_schedule(kind) for kind in KINDS} | {"steep": make_schedule("poly", exponent=300.0)}
compiled = jax.jit(
    sample,
    static_argnames=("denoise", "shape", "mask_id", "schedule", "num_steps", "sampler", "temperature"),
    compiler_options={"xla_backend_optimization_level": 1},  # the loops are long enough to gain from it
)


def draw(
    denoise: Denoise = EXACT,
    rows: int = 64,
    length: int = LENGTH,
    *,
    key: jax.Array = KEY,
    kind: str = "linear",
    num_steps: int = 8,
    **options: Any,
) -> np.ndarray:
    shape, schedule = (rows, length), SCHEDULES[kind]
    return np.asarray(
        compiled(denoise, key, shape=shape, mask_id=MASK_ID, schedule=schedule, num_steps=num_steps, **options)
    )


def frequencies(rows: np.ndarray) -> np.ndarray:
    """Share of each sequence among rows, in the shape of a table."""
    flat = np.ravel_multi_index(tuple(rows.T), (TOKENS,) * rows.shape[1])
    return np.bincount(flat, minlength=TOKENS ** rows.shape[1]).reshape((TOKENS,) * rows.shape[1]) / len(rows)


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    return 0.5 * float(np.abs(p - q).sum())


def sampling_error(law: np.ndarray, draws: int) -> float:
    """Expected total variation between a law and the frequencies of that many draws from it."""
    return 0.5 * float(np.sqrt(2 * law * (1 - law) / (np.pi * draws)).sum())


def law_of_steps(table: np.ndarray, mask_rates: list[float]) -> np.ndarray:
    """The law that sampling in few steps has: tokens that appear in one step are drawn apart from each other.

    Args:
        table: The law whose conditionals the denoiser knows.
        mask_rates: Share masked after each step, from 1 at the start to 0 at the end.
    """
    length = table.ndim
    chance = -np.diff(mask_rates)
    result = np.zeros_like(table)
    for when in product(range(len(chance)), repeat=length):
        law = np.ones_like(table)
        for i, step in enumerate(when):
            known = {j for j in range(length) if when[j] < step}
            joint = table.sum(axis=tuple(set(range(length)) - known - {i}), keepdims=True)
            law = law * joint / joint.sum(axis=i, keepdims=True)
        result += law * np.prod(chance[list(when)])
    return result


def test_ancestral_sampling_in_many_steps_draws_from_the_law() -> None:
    rows = draw(rows=ROWS, num_steps=STEPS)
    assert total_variation(frequencies(rows), TABLE) < 1.3 * sampling_error(TABLE, ROWS)


@pytest.mark.parametrize(("num_steps", "kind"), [(1, "linear"), (2, "linear"), (2, "cosine"), (3, "sqrt")])
def test_few_steps_draw_from_the_law_that_enumeration_gives(num_steps: int, kind: str) -> None:
    schedule = make_schedule(kind)
    rates = [float(schedule.mask_rate(jnp.float32(1 - i / num_steps))) for i in range(num_steps + 1)]
    expected = law_of_steps(TABLE, rates)
    assert expected.sum() == pytest.approx(1, abs=1e-6)
    drawn = frequencies(draw(rows=ROWS, num_steps=num_steps, kind=kind))
    assert total_variation(drawn, expected) < 1.3 * sampling_error(expected, ROWS)
    assert total_variation(drawn, TABLE) > 2 * sampling_error(TABLE, ROWS)


def test_more_steps_come_closer_to_the_law() -> None:
    distances = [total_variation(frequencies(draw(rows=ROWS, num_steps=n)), TABLE) for n in (1, 2, 8)]
    assert distances[0] > distances[1] > distances[2]


def test_infilling_draws_from_the_conditional_law() -> None:
    pattern = jnp.asarray([MASK_ID, 2, MASK_ID, 0])
    rows = draw(rows=ROWS, num_steps=STEPS, prompt=pattern)
    conditional = TABLE[:, 2, :, 0] / TABLE[:, 2, :, 0].sum()
    assert total_variation(frequencies(rows[:, [0, 2]]), conditional) < 1.75 * sampling_error(conditional, ROWS)


@pytest.mark.parametrize("kind", ["linear", "cosine", "sqrt", "poly"])
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_no_mask_and_no_padding_is_left_after_any_number_of_steps(num_steps: int, kind: str) -> None:
    rows = draw(CHAIN, 256, 8, num_steps=num_steps, kind=kind)
    assert rows.dtype == np.int32
    assert rows.shape == (256, 8)
    assert rows.min() >= 0
    assert rows.max() < MASK_ID
    assert set(np.unique(rows)) == {0, 1, 2}


def test_no_mask_is_left_under_a_schedule_so_steep_that_its_mask_rate_underflows() -> None:
    rows = draw(CHAIN, 64, 8, num_steps=50, kind="steep")
    assert rows.max() < MASK_ID


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_a_prompt_for_all_rows_is_never_altered(temperature: float) -> None:
    prompt = np.int32([2, 0, 0])
    rows = draw(CHAIN, 64, 8, prompt=jnp.asarray(prompt), temperature=temperature)
    np.testing.assert_array_equal(rows[:, :3], np.tile(prompt, (64, 1)))
    assert rows.max() < MASK_ID


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_a_prompt_for_each_row_is_never_altered(temperature: float) -> None:
    prompt = np.random.default_rng(0).integers(0, TOKENS, (64, 3)).astype(np.int32)
    rows = draw(CHAIN, 64, 8, prompt=jnp.asarray(prompt), temperature=temperature)
    np.testing.assert_array_equal(rows[:, :3], prompt)
    assert rows.max() < MASK_ID


def test_an_infilling_pattern_keeps_its_tokens_and_fills_its_masks() -> None:
    rng = np.random.default_rng(0)
    pattern = np.where(rng.random((64, 8)) < 0.5, MASK_ID, rng.integers(0, TOKENS, (64, 8))).astype(np.int32)
    rows = draw(CHAIN, 64, 8, prompt=jnp.asarray(pattern))
    np.testing.assert_array_equal(np.where(pattern == MASK_ID, MASK_ID, rows), pattern)
    assert rows.max() < MASK_ID


def test_a_prompt_that_fills_the_row_comes_back_as_it_is() -> None:
    prompt = jnp.asarray([0, 1, 2, 1])
    np.testing.assert_array_equal(draw(rows=2, prompt=prompt), [[0, 1, 2, 1]] * 2)


def test_the_denoiser_never_sees_a_token_masked_again_and_sees_the_grid_of_times() -> None:
    seen: list[tuple[np.ndarray, float]] = []

    def watched(x_t: jax.Array, t: jax.Array) -> jax.Array:
        jax.debug.callback(lambda x, time: seen.append((np.array(x), float(time[0]))), x_t, t, ordered=True)
        return EXACT(x_t, t)

    rows = draw(watched, num_steps=5)
    jax.effects_barrier()
    assert [time for _, time in seen] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    states = [x for x, _ in seen] + [rows]
    assert (states[0] == MASK_ID).all()
    for before, after in pairwise(states):
        np.testing.assert_array_equal(after[before != MASK_ID], before[before != MASK_ID])
    assert any((before != after).any() for before, after in pairwise(states))


def test_a_key_fixes_the_output_and_another_key_changes_it() -> None:
    first, again, other = (draw(key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_jit_changes_nothing() -> None:
    denoise = fixed([0.2, 0.3, 0.5])
    plain = sample(denoise, KEY, shape=(64, LENGTH), mask_id=MASK_ID, schedule=make_schedule("linear"), num_steps=3)
    np.testing.assert_array_equal(plain, draw(denoise, num_steps=3))


def test_a_prompt_may_be_traced() -> None:
    run = partial(sample, EXACT, shape=(8, LENGTH), mask_id=MASK_ID, schedule=make_schedule("linear"), num_steps=3)
    prompts = jnp.asarray([[0, 1], [2, 2]])
    rows = jax.jit(jax.vmap(lambda prompt: run(KEY, prompt=prompt)))(prompts)
    np.testing.assert_array_equal(rows[:, :, :2], np.repeat(np.asarray(prompts)[:, None], 8, axis=1))


def fixed(p: list[float]) -> Denoise:
    """Predicts the same probabilities everywhere, and mask and padding far above them."""
    logits = jnp.concatenate([jnp.log(jnp.asarray(p)), jnp.full(VOCAB - TOKENS, FORBIDDEN_LOGIT)])
    return lambda x_t, t: jnp.broadcast_to(logits, (*x_t.shape, VOCAB))


def test_temperature_zero_takes_the_most_likely_token() -> None:
    np.testing.assert_array_equal(draw(fixed([0.3, 0.36, 0.34]), temperature=0.0), 1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0, 1e6])
def test_temperature_raises_probabilities_to_its_inverse(temperature: float) -> None:
    p = np.array([0.1, 0.3, 0.6])
    rows = draw(fixed(p.tolist()), 5000, temperature=temperature, num_steps=2)
    expected = p ** (1 / temperature) / (p ** (1 / temperature)).sum()
    drawn = np.bincount(rows.reshape(-1), minlength=TOKENS) / rows.size
    assert (np.abs(drawn - expected) < 4 * np.sqrt(expected * (1 - expected) / rows.size)).all()


def test_rare_tokens_are_drawn_as_often_as_they_should_be() -> None:
    rare = 1e-4
    rows = draw(fixed([rare, 0.5 - rare, 0.5]), 10_000, 20, num_steps=1)
    expected = rare * rows.size
    assert abs((rows == 0).sum() - expected) < 4 * np.sqrt(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "gibbs"}, "unknown sampler 'gibbs': choose ancestral"),
        ({"num_steps": 0}, "num_steps must be at least 1, not 0"),
        ({"num_steps": -3}, "num_steps must be at least 1, not -3"),
        ({"temperature": -0.5}, "temperature must not be negative, not -0.5"),
        ({"prompt": jnp.zeros(LENGTH + 1, jnp.int32)}, r"prompt of shape \(1, 5\) does not fit .* \(64, 4\)"),
        ({"prompt": jnp.zeros((3, 2), jnp.int32)}, r"prompt of shape \(3, 2\) does not fit .* \(64, 4\)"),
    ],
)
def test_an_argument_that_makes_no_sense_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(**options)
