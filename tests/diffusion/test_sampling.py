import inspect
from collections.abc import Callable
from functools import partial
from itertools import pairwise, product
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanodlm.diffusion import tokens as diffusion_tokens
from nanodlm.diffusion.cross_entropy import predictable
from nanodlm.diffusion.kinds import SAMPLERS, ByScore, Remasking
from nanodlm.diffusion.mixed import shares
from nanodlm.diffusion.noise import Denoise, remask_probability
from nanodlm.diffusion.plain import plain_sample
from nanodlm.diffusion.sampling import sample
from nanodlm.diffusion.schedules import make_schedule
from nanodlm.diffusion.tokens import limited
from tests.support.laws import (
    FORBIDDEN_LOGIT,
    MASK_ID,
    TOKENS,
    VOCAB,
    Watched,
    assert_drawn_from,
    chain_log_p,
    exact_denoiser,
    exact_mixed_denoiser,
    frequencies,
    markov_table,
    rough_table,
    sampling_error,
    total_variation,
)

LENGTH = 4
TABLE = rough_table(LENGTH)
EXACT = exact_denoiser(TABLE)
CHAIN = exact_denoiser(markov_table(8))
STEPS, ROWS = 64, 8000
KEY = jax.random.key(7)


SCHEDULES = {kind: make_schedule(kind) for kind in ("linear", "cosine", "sqrt", "poly", "sqrt_clipped")} | {
    "steep": make_schedule("poly", exponent=300.0),
    "jumps": make_schedule("linear_clipped", eps=0.2),
}
STATIC = ("denoise", "shape", "mask_id", "schedule", "num_steps", "sampler", "temperature", "top_k", "top_p", "grid")
STATIC += ("guidance", "uniform_share", "entropy_bound", "threshold", "remask", "loop_time")
compiled = jax.jit(sample, static_argnames=STATIC)


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
    options |= {"shape": (rows, length), "mask_id": MASK_ID, "schedule": SCHEDULES[kind], "num_steps": num_steps}
    drawn = compiled(denoise, key, **options)
    jax.effects_barrier()  # of denoisers that are watched
    return np.asarray(drawn)


def law_of_steps(table: np.ndarray, mask_rates: list[float]) -> np.ndarray:
    """The law that sampling in few steps has: tokens that appear in one step are drawn apart from each other.

    The denoiser knows the conditionals of `table`; mask rates are those after each step, from 1 to 0.
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


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("ancestral", {"num_steps": STEPS}),
        ("first_hitting", {"num_steps": 1}),
        ("spread", {"num_steps": 8}),  # more than LENGTH - 1 over 0.38: no two tokens share a step
        ("margin", {"num_steps": LENGTH}),  # one token at a time, in an order that known tokens decide
        ("entropy", {"num_steps": LENGTH, "entropy_bound": 0.0}),  # likewise
        ("remdm_cap", {"num_steps": 2 * STEPS, "remask": 0.01}),
    ],
)
def test_exact_samplers_draw_from_the_law(sampler: str, options: dict[str, Any]) -> None:
    assert_drawn_from(TABLE, draw(rows=ROWS, sampler=sampler, **options))


@pytest.mark.parametrize(("num_steps", "kind", "grid"), [(3, "linear", "cosine"), (3, "jumps", "uniform")])
def test_few_steps_draw_from_the_law_that_enumeration_gives(num_steps: int, kind: str, grid: str) -> None:
    x = np.arange(1, num_steps) / num_steps
    times = np.cos(np.pi / 2 * x) if grid == "cosine" else 1 - x
    rates = [1.0, *np.asarray(SCHEDULES[kind].mask_rate(jnp.asarray(times, jnp.float32))).tolist(), 0.0]
    expected = law_of_steps(TABLE, rates)
    assert expected.sum() == pytest.approx(1, abs=1e-6)
    drawn = draw(rows=ROWS, num_steps=num_steps, kind=kind, grid=grid)
    assert_drawn_from(expected, drawn)
    assert total_variation(frequencies(drawn), TABLE) > 2 * sampling_error(TABLE, ROWS)


def test_the_plain_sampler_has_the_law_of_the_full_ancestral_one() -> None:
    expected = law_of_steps(TABLE, [1.0, 0.5, 0.0])
    plain = jax.jit(partial(plain_sample, EXACT, shape=(ROWS, LENGTH), mask_id=MASK_ID, num_steps=2))(KEY)
    for rows in (np.asarray(plain), draw(rows=ROWS, num_steps=2)):
        assert_drawn_from(expected, rows)


def test_infilling_draws_from_the_conditional_law() -> None:
    pattern = jnp.asarray([MASK_ID, 2, MASK_ID, 0])
    rows = draw(rows=ROWS, num_steps=STEPS, prompt=pattern)
    conditional = TABLE[:, 2, :, 0] / TABLE[:, 2, :, 0].sum()
    assert_drawn_from(conditional, rows[:, [0, 2]], 1.75)


@pytest.mark.parametrize(("num_steps", "kind"), [(1, "linear"), (7, "sqrt_clipped"), (50, "steep")])
def test_no_mask_and_no_padding_is_left_after_any_number_of_steps(num_steps: int, kind: str) -> None:
    rows = draw(CHAIN, 256, 8, num_steps=num_steps, kind=kind)
    assert (rows.dtype, rows.shape) == (np.int32, (256, 8))
    assert set(np.unique(rows)) == {0, 1, 2}


@pytest.mark.parametrize(
    ("grid", "times"), [("uniform", [1.0, 0.8, 0.6, 0.4, 0.2]), ("cosine", np.cos(np.pi / 10 * np.arange(5)).tolist())]
)
def test_the_denoiser_never_sees_a_token_masked_again_and_sees_the_grid_of_times(grid: str, times: list[float]) -> None:
    watched = Watched(EXACT)
    rows = draw(watched, num_steps=5, grid=grid)
    np.testing.assert_allclose(watched.t, np.repeat(np.array(times)[:, None], 64, axis=1), atol=1e-6)
    states = [*watched.x, rows]
    assert (states[0] == MASK_ID).all()
    for before, after in pairwise(states):
        np.testing.assert_array_equal(after[before != MASK_ID], before[before != MASK_ID])
    assert any((before != after).any() for before, after in pairwise(states))


def fixed(p: list[float]) -> Denoise:
    """Predicts the same probabilities everywhere, and mask and padding far above them."""
    logits = jnp.concatenate([jnp.log(jnp.asarray(p)), jnp.full(VOCAB - TOKENS, FORBIDDEN_LOGIT)])
    return lambda x_t, t: jnp.broadcast_to(logits, (*x_t.shape, VOCAB))


MIXED = {"uniform": {"uniform_share": 1.0}, "hybrid": {"uniform_share": 0.4}}
PATTERN = np.random.default_rng(1).integers(0, TOKENS, (32, 6)).astype(np.int32)
PATTERN[np.random.default_rng(2).random((32, 6)) < 0.5] = MASK_ID
PATTERN[:8, 2:] = MASK_ID  # prompts in the front
PATTERN[8], PATTERN[9] = MASK_ID, 1  # nothing given, and everything


COLD = {"temperature": 0.0, "top_p": 0.8}
FILTERED = {"temperature": 2.0, "top_k": 2, "top_p": 0.99}


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        *((name, FILTERED | {"guidance": 0.5}) for name in (*SAMPLERS, "hybrid")),
        ("uniform", FILTERED),
        ("entropy", COLD),
        ("uniform", COLD),
    ],
)
def test_every_sampler_keeps_any_prompt_and_leaves_no_mask(sampler: str, options: dict[str, Any]) -> None:
    how = options | MIXED.get(sampler, {"sampler": sampler})
    again = partial(draw, fixed([0.3, 0.6, 0.1]), 32, 6, num_steps=5, prompt=jnp.asarray(PATTERN), **how)
    rows = again()
    np.testing.assert_array_equal(np.where(PATTERN == MASK_ID, MASK_ID, rows), PATTERN)
    assert set(rows[PATTERN == MASK_ID].tolist()) == ({1} if options is COLD else {0, 1})
    np.testing.assert_array_equal(rows, again())
    assert (rows != again(key=jax.random.key(8))).any() or options is COLD


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "expected"),
    [
        (1.0, 1, 1.0, [0, 1, 0]),
        (1.0, 2, 1.0, [0.4, 0.6, 0]),
        (1.0, 9, 1.0, [0.36, 0.54, 0.1]),
        (1.0, 0, 0.5, [0, 1, 0]),
        (1.0, 0, 0.6, [0.4, 0.6, 0]),
        (1.0, 0, 0.95, [0.36, 0.54, 0.1]),
        (1.0, 2, 0.58, [0, 1, 0]),  # the nucleus of what top-k has left
        (0.5, 0, 0.68, [0.16 / 0.52, 0.36 / 0.52, 0]),  # sharpened first: 0.2986, 0.6718, 0.023
        (0.0, 2, 0.5, [0, 1, 0]),
        (1e-30, 0, 1.0, [0, 1, 0]),
    ],
)
def test_top_k_and_top_p_cut_the_distribution_and_renormalise_it(
    temperature: float, top_k: int, top_p: float, expected: list[float]
) -> None:
    logits = predictable(fixed([0.36, 0.54, 0.1])(jnp.zeros((1, 1)), jnp.ones(1)), mask_id=MASK_ID)
    p = jax.nn.softmax(limited(logits, temperature, top_k, top_p))[0, 0]
    np.testing.assert_allclose(p, [*expected, 0, 0], rtol=1e-5)


def test_skipping_steps_with_nothing_to_do_changes_no_bit_and_saves_calls() -> None:
    every, skipping = Watched(EXACT), Watched(EXACT)
    prompt = jnp.asarray(PATTERN[:, :LENGTH])
    same = {"num_steps": 50, "grid": "cosine", "kind": "cosine", "prompt": prompt}
    np.testing.assert_array_equal(draw(every, 32, **same), draw(skipping, 32, **same, sampler="ancestral_skip"))
    assert len(every.x) == 50
    assert len(skipping.x) <= LENGTH
    for row in range(32):  # each sees what it saw, at the same times
        seen = [{(x[row].tobytes(), float(t[row])) for x, t in zip(w.x, w.t, strict=True)} for w in (skipping, every)]
        assert {(x, t) for x, t in seen[0] if MASK_ID in np.frombuffer(x, np.int32)} <= seen[1]


def test_first_hitting_calls_once_for_each_mask_at_the_time_its_token_appears() -> None:
    watched = Watched(EXACT)
    given = jnp.asarray([MASK_ID, 1, MASK_ID, MASK_ID])
    rows = draw(watched, 4000, sampler="first_hitting", kind="cosine", prompt=given)
    assert len(watched.x) == 3
    for before, after in pairwise([*watched.x, rows]):
        np.testing.assert_array_equal((before != after).sum(axis=1), 1)
    rates = np.asarray(SCHEDULES["cosine"].mask_rate(jnp.asarray(watched.t)))
    assert (np.diff(rates, axis=0) <= 0).all()
    # The times of the first, second and third of three uniform numbers.
    np.testing.assert_allclose(rates.mean(axis=1), [3 / 4, 2 / 4, 1 / 4], atol=0.02)


def test_spread_unmasks_each_mask_in_any_step_alike_and_those_of_a_step_far_apart() -> None:
    steps, given = 8, jnp.where(jnp.arange(40) % 5 == 2, 1, MASK_ID)  # 32 masks between tokens
    watched = Watched(by_position([[0.5, 0.3, 0.2]] * 40))
    rows = draw(watched, 4000, 40, sampler="spread", num_steps=steps, prompt=given)
    assert len(watched.x) == steps
    masked = np.stack([*watched.x, rows])[:, :, given == MASK_ID] == MASK_ID
    when = masked.sum(axis=0) - 1
    shares = np.stack([(when == step).mean(axis=0) for step in range(steps)])
    np.testing.assert_allclose(shares, 1 / steps, atol=0.025)  # 4.8 errors
    apart = [np.diff(np.flatnonzero(row == step)).min() for row in when[:500] for step in range(steps)]
    assert min(apart) > 0.38 * steps


def test_spread_is_nearer_to_the_law_in_few_steps() -> None:
    entropy = -float((markov_table(8) * np.log(markov_table(8))).sum())
    samplers = ("ancestral", "spread")
    excess = [-chain_log_p(draw(CHAIN, ROWS, 8, sampler=name, num_steps=4)).mean() - entropy for name in samplers]
    assert 0 < excess[1] < excess[0] / 10


def by_position(table: list[list[float]]) -> Denoise:
    """Predicts the probabilities of each position from a table, whatever it sees."""
    p = jnp.asarray(table)
    forbidden = jnp.full((*p.shape[:1], VOCAB - TOKENS), FORBIDDEN_LOGIT)
    logits = jnp.concatenate([jnp.log(p), forbidden], axis=1)
    return lambda x_t, t: jnp.broadcast_to(logits, (*x_t.shape, VOCAB))


UNSURE_P = np.array([[0.6, 0.39, 0.01], [0.55, 0.225, 0.225], [0.52, 0.478, 0.002], [0.98, 0.01, 0.01]])
UNSURE = by_position(UNSURE_P.tolist())
UNSURE_ORDER = {"confidence": [3, 0, 1, 2], "margin": [3, 1, 0, 2], "entropy": [3, 2, 0, 1], "threshold": [3, 0, 1, 2]}


@pytest.mark.parametrize("sampler", get_args(ByScore))
def test_the_surest_positions_unmask_first(sampler: str) -> None:
    watched = Watched(UNSURE)
    options = {"num_steps": 4, "temperature": 0.0, "entropy_bound": 0.0}
    rows = draw(watched, 3, sampler=sampler, **options)
    states = [*watched.x, rows]
    assert len(watched.x) == 4
    order = [int(np.flatnonzero(before[0] != after[0])[0]) for before, after in pairwise(states)]
    assert order == UNSURE_ORDER[sampler]
    for i, state in enumerate(states):
        np.testing.assert_array_equal((state == MASK_ID).sum(axis=1), 4 - i)


def test_as_many_masks_are_left_as_the_schedule_says() -> None:
    watched = Watched(CHAIN)
    pattern = np.full((3, 8), MASK_ID, np.int32)
    pattern[1, :3], pattern[2] = 0, 1
    rows = draw(watched, 3, 8, sampler="confidence", kind="cosine", num_steps=5, prompt=jnp.asarray(pattern))
    rates = np.array([1.0, *SCHEDULES["cosine"].mask_rate(jnp.arange(4, 0, -1) / 5).tolist(), 0.0])
    left = [(x == MASK_ID).sum(axis=1) for x in [*watched.x, rows]]
    np.testing.assert_array_equal(left, np.round(rates[:, None] * [8, 5, 0]))


def test_confidence_is_the_probability_of_the_token_that_was_drawn() -> None:
    watched = Watched(by_position([[0.9, 0.1, 0.0], [0.5, 0.5, 0.0]]))
    draw(watched, 4000, 2, sampler="confidence", num_steps=2)
    first_is_kept = (watched.x[1][:, 0] != MASK_ID).mean()
    assert first_is_kept == pytest.approx(0.9, abs=4 * np.sqrt(0.09 / 4000))  # its unlikely token loses to 0.5


def test_the_entropy_bound_says_how_many_positions_unmask_at_once() -> None:
    h = np.sort(-(UNSURE_P * np.log(UNSURE_P)).sum(axis=1))
    for bound, calls in ((h[0] + 0.01, 3), (h[:3].sum() - 0.01, 2), (1e9, 1)):  # the largest does not count
        watched = Watched(UNSURE)
        draw(watched, 2, sampler="entropy", num_steps=10, entropy_bound=float(bound))
        assert len(watched.x) == calls
    np.testing.assert_allclose(watched.t[0], 1.0)


def test_entropy_tells_the_model_what_share_is_masked_and_ends_in_its_last_step() -> None:
    watched = Watched(UNSURE)
    rows = draw(watched, 2, sampler="entropy", num_steps=3, entropy_bound=0.0, kind="sqrt")
    np.testing.assert_allclose([t[0] for t in watched.t], np.array([1, 3 / 4, 2 / 4]) ** 2, rtol=1e-6)
    assert rows.max() < MASK_ID


def law_of_threshold(table: np.ndarray, threshold: float) -> np.ndarray:
    """The law of `threshold`, from all that can be drawn in each step."""
    result = np.zeros_like(table)

    def go_on(known: dict[int, int], chance: float) -> None:
        free = [i for i in range(table.ndim) if i not in known]
        if not free:
            result[tuple(known[i] for i in range(table.ndim))] += chance
            return
        rest = table[tuple(known.get(i, slice(None)) for i in range(table.ndim))]
        p = [rest.sum(axis=tuple({*range(rest.ndim)} - {k})) / rest.sum() for k in range(rest.ndim)]
        for drawn in product(range(TOKENS), repeat=len(free)):
            likely = [float(p[k][token]) for k, token in enumerate(drawn)]
            kept = [k for k, value in enumerate(likely) if value > threshold] or [int(np.argmax(likely))]
            go_on(known | {free[k]: drawn[k] for k in kept}, chance * float(np.prod(likely)))

    go_on({}, 1.0)
    return result


@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_the_threshold_draws_from_the_law_that_enumeration_gives(threshold: float) -> None:
    table = rough_table(3)
    expected = law_of_threshold(table, threshold)
    assert expected.sum() == pytest.approx(1)
    drawn = draw(exact_denoiser(table), ROWS, 3, sampler="threshold", threshold=threshold)
    assert_drawn_from(expected, drawn)
    assert total_variation(expected, table) > 2 * sampling_error(table, ROWS)


def test_the_threshold_says_which_tokens_appear_at_once_and_the_last_step_takes_all() -> None:
    for threshold, num_steps, masks in ((0.0, 9, [4]), (0.53, 9, [4, 1]), (0.99, 9, [4, 3, 2, 1]), (0.99, 2, [4, 3])):
        watched = Watched(UNSURE)
        options = {"threshold": threshold, "temperature": 0.0, "kind": "sqrt", "num_steps": num_steps}
        rows = draw(watched, 2, sampler="threshold", **options)
        assert rows.max() < MASK_ID
        assert [int((x[0] == MASK_ID).sum()) for x in watched.x] == masks
        np.testing.assert_allclose([t[0] for t in watched.t], (np.array(masks) / 4) ** 2, rtol=1e-6)


def masks_left(watched: Watched) -> np.ndarray:
    return np.array([(x == MASK_ID).mean() for x in watched.x])


@pytest.mark.parametrize("sampler", get_args(Remasking))
def test_remasking_keeps_the_share_of_masks_on_the_schedule_while_tokens_change(sampler: str) -> None:
    watched = Watched(fixed([0.2, 0.3, 0.5]))
    rows, length, n = 4000, 8, 9
    drawn = draw(watched, rows, length, sampler=sampler, num_steps=n, kind="cosine", remask=0.2, loop_time=0.4)
    times = np.array([t[0] for t in watched.t])
    rates = np.array([1.0, *np.asarray(SCHEDULES["cosine"].mask_rate(jnp.asarray(times[1:])))])
    if sampler == "remdm_loop":
        np.testing.assert_allclose(times, [1, 0.8, 0.6, 0.4, 0.4, 0.4, 0.4, 0.8 / 3, 0.4 / 3], rtol=1e-5)
    expected = rates.copy()
    if sampler == "remdm_conf":  # masks unmask as ever, and sigma_max of one token is masked again
        for i in range(n - 1):
            any_token = (watched.x[i] != MASK_ID).any(axis=1).mean()
            more = min(1, rates[i + 1] / max(1 - rates[i], 1e-9)) * any_token / length
            expected[i + 1] = expected[i] * rates[i + 1] / rates[i] + more
    np.testing.assert_allclose(masks_left(watched), expected, atol=5 * 0.5 / np.sqrt(rows * length))
    again = [((a != MASK_ID) & (b == MASK_ID)).any() for a, b in pairwise([*watched.x, drawn])]
    assert again[-1] == 0
    assert again == [3 <= i < 6 if sampler == "remdm_loop" else 1 <= i < n - 1 for i in range(n)]
    assert any(((a != b) & (a < MASK_ID) & (b < MASK_ID)).any() for a, b in product(watched.x[2:], [drawn]))


def test_remasking_probabilities_are_those_of_the_paper() -> None:
    rng = np.random.default_rng(0)
    psi, tokens = rng.random((2, 5)).astype(np.float32), rng.random((2, 5)) < 0.6
    for alpha_t, alpha_s in ((0.0, 0.2), (0.2, 0.3), (0.6, 0.9), (0.9, 1.0)):
        most = min(1.0, (1 - alpha_s) / alpha_t) if alpha_t else 1.0
        softmax = np.where(tokens, np.exp(-psi), 0)
        softmax /= softmax.sum(axis=1, keepdims=True)
        expected = {"cap": min(0.3, most), "loop": min(0.3, most), "rescale": 0.3 * most, "conf": most * softmax}
        rates = (jnp.float32(1 - alpha_t), jnp.float32(1 - alpha_s))
        for name, sigma in expected.items():
            got = remask_probability(f"remdm_{name}", 0.3, rates, jnp.asarray(psi), jnp.asarray(tokens))
            np.testing.assert_allclose(got, np.broadcast_to(sigma, (2, 5)), rtol=1e-5, atol=1e-7)


def reverse_law(p: Callable[[np.ndarray, float], np.ndarray], rates: list[float], share: float) -> np.ndarray:
    """Law of two positions after reverse steps of mixed noise, by multiplying out p(x_s | x_t), in float64."""
    n, size = TOKENS, MASK_ID + 1
    at = [[float(v) for v in shares(jnp.float32(m), share)] for m in rates]
    start = np.array([at[0][2] / n] * n + [at[0][1]])
    law = np.outer(start, start)
    for m, (kept_t, masked_t, uniform_t), (kept_s, masked_s, uniform_s) in zip(rates, at, at[1:], strict=False):
        a = kept_t / kept_s
        back = a * np.eye(size) + np.array([(uniform_t - a * uniform_s) / n] * n + [masked_t - a * masked_s])
        after = np.zeros_like(law)
        for z in zip(*np.nonzero(law), strict=True):
            step = []
            for i in range(2):
                q_s = np.array([*(kept_s * p(np.array(z), m)[i] + uniform_s / n), masked_s]) * back[:, z[i]]
                step.append(q_s / q_s.sum() if q_s.sum() else q_s)
            after += law[z] * np.outer(*step)
        law = after
    assert law[n].sum() + law[:, n].sum() == 0
    return law[:n, :n]


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_mixed_noise_is_taken_back_as_multiplying_out_its_reverse_steps_gives(share: float) -> None:
    table = rough_table(2)
    denoise = exact_mixed_denoiser(table, SCHEDULES["linear"], share)

    def p(x: np.ndarray, m: float) -> np.ndarray:
        return np.exp(np.asarray(denoise(jnp.asarray(x[None], jnp.int32), jnp.float32([m])))[0, :, :TOKENS])

    expected = reverse_law(p, [1, 2 / 3, 1 / 3, 0], share)
    assert_drawn_from(expected, draw(denoise, ROWS, 2, num_steps=3, uniform_share=share), 2.0)


@pytest.mark.parametrize(("share", "num_steps"), [(1.0, STEPS), (0.2, 2 * STEPS)])
def test_mixed_noise_is_taken_back_to_the_law_in_many_steps(share: float, num_steps: int) -> None:
    table = rough_table(3)
    denoise = exact_mixed_denoiser(table, SCHEDULES["poly"], share)
    assert_drawn_from(table, draw(denoise, ROWS, 3, num_steps=num_steps, uniform_share=share, kind="poly"))


def test_uniform_noise_starts_from_random_tokens_and_changes_them() -> None:
    watched = Watched(fixed([0.8, 0.1, 0.1]))
    drawn = draw(watched, 2000, num_steps=4, uniform_share=1.0, prompt=jnp.asarray([2]))
    for x in watched.x:
        assert (x[:, 0] == 2).all()
        assert x.max() < MASK_ID
    np.testing.assert_allclose(np.bincount(watched.x[0][:, 1:].reshape(-1)) / 6000, 1 / 3, atol=0.03)
    assert (watched.x[0] != drawn)[:, 1:].mean() > 0.3


def test_guidance_is_the_formula_of_the_model_with_and_without_the_prompt() -> None:
    with_prompt, without = np.array([0.2, 0.3, 0.5]), np.array([0.4, 0.4, 0.2])

    def denoise(x_t: jax.Array, t: jax.Array) -> jax.Array:
        seen = (x_t[:, :1] == 1)[..., None]  # the prompt
        return jnp.where(seen, fixed(with_prompt.tolist())(x_t, t), fixed(without.tolist())(x_t, t))

    def drawn(watched: Watched, **options: Any) -> np.ndarray:
        rows = draw(watched, 5000, num_steps=2, prompt=jnp.asarray([1]), **options)[:, 1:]
        return np.bincount(rows.reshape(-1), minlength=TOKENS) / rows.size

    for w in (0.0, 1.5):
        watched = Watched(denoise)
        p = with_prompt ** (1 + w) / without**w
        p /= p.sum()
        np.testing.assert_allclose(drawn(watched, guidance=w), p, atol=4 * 0.5 / np.sqrt(15_000))
        assert len(watched.x) == (4 if w else 2)


def test_guidance_without_a_prompt_changes_nothing_and_calls_nothing() -> None:
    plain, guided = Watched(EXACT), Watched(EXACT)
    empty = jnp.zeros(0, jnp.int32)
    np.testing.assert_array_equal(draw(plain), draw(guided, guidance=3.0, prompt=empty))
    assert len(plain.x) == len(guided.x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "gibbs"}, "unknown sampler 'gibbs': choose one of spread, .*, remdm_loop"),
        ({"grid": "log"}, "unknown grid 'log': choose uniform or cosine"),
        ({"top_k": -1}, "top_k must not be negative, not -1"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, not 1.5"),
        ({"guidance": -1.0}, "guidance must not be negative, not -1.0"),
        ({"uniform_share": 1.5}, "uniform_share must be between 0 and 1, not 1.5"),
        ({"uniform_share": 0.5, "sampler": "confidence"}, "confidence is for masks alone: choose ancestral"),
        ({"uniform_share": 1.0, "guidance": 1.0}, "no mask to hide a prompt with: choose guidance 0"),
        ({"entropy_bound": -0.1}, "entropy_bound must not be negative, not -0.1"),
        ({"threshold": 1.1}, "threshold must be between 0 and 1, not 1.1"),
        ({"remask": 2.0}, "remask must be between 0 and 1, not 2.0"),
        ({"loop_time": 1.0}, "loop_time must be above 0 and below 1, not 1.0"),
        ({"num_steps": 0}, "num_steps must be at least 1, not 0"),
        ({"temperature": -0.5}, "temperature must be finite and not negative, not -0.5"),
        ({"prompt": jnp.zeros(LENGTH + 1, jnp.int32)}, r"prompt of shape \(1, 5\) does not fit .* \(64, 4\)"),
        ({"prompt": jnp.zeros((3, 2), jnp.int32)}, r"prompt of shape \(3, 2\) does not fit .* \(64, 4\)"),
    ],
)
def test_an_argument_that_makes_no_sense_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(**options)


def test_tokens_are_gumbel_maxima_of_high_precision_noise_first_over_parts_bit_for_bit() -> None:
    logits, steps, places = jax.random.normal(jax.random.key(1), (3, 200)), jnp.array([4, 4, 7]), jnp.array([0, 9, 9])
    drawn = diffusion_tokens._categorical(KEY, steps, places, logits)
    parts = jnp.pad(logits, ((0, 0), (0, 10)), constant_values=-jnp.inf).reshape(3, 15, 14)
    for i, (step, place) in enumerate(zip(steps, places, strict=True)):
        keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(KEY, step), place))
        part = jnp.argmax(jax.nn.logsumexp(parts[i], axis=-1) + jax.random.gumbel(keys[0], (15,), mode="high"))
        inside = jnp.argmax(parts[i, part] + jax.random.gumbel(keys[1], (14,), mode="high"))
        assert drawn[i] == part * 14 + inside


@pytest.mark.parametrize("size", [1, 2, 7, 16])
def test_tokens_have_the_probabilities_of_their_logits(size: int) -> None:
    logits = np.append(2 * np.random.default_rng(size).normal(size=size - 1), 0.0)
    logits[: size // 3] = -np.inf
    law = np.exp(logits) / np.exp(logits).sum()
    n = 20_000
    drawn = diffusion_tokens._categorical(KEY, jnp.int32(3), jnp.arange(n), jnp.tile(jnp.float32(logits), (n, 1)))
    found = np.bincount(drawn, minlength=size) / n
    assert found[law == 0].sum() == 0
    np.testing.assert_array_less(np.abs(found - law), 4 * np.sqrt(law * (1 - law) / n) + 1e-9)


def test_what_cannot_be_drawn_is_minus_one() -> None:
    logits = jnp.array([[0.0, jnp.nan, 1.0], [jnp.inf, 0.0, 0.0], [-jnp.inf] * 3, [-jnp.inf, 0.0, -jnp.inf]])
    assert diffusion_tokens._categorical(KEY, jnp.int32(0), jnp.arange(4), logits).tolist() == [-1, -1, -1, 1]


@pytest.mark.parametrize("options", [{}, {"sampler": "margin"}, {"guidance": 0.5, "prompt": jnp.array([1])}])
def test_logits_are_made_only_where_tokens_appear_and_are_those_of_the_whole_row(options: dict[str, Any]) -> None:
    made = []

    class Apart:
        def __call__(self, x_t: jax.Array, t: jax.Array) -> jax.Array:
            return self.score(self.features(x_t, t))

        def features(self, x_t: jax.Array, t: jax.Array) -> jax.Array:
            return EXACT(x_t, t)

        def score(self, features: jax.Array) -> jax.Array:
            jax.debug.callback(lambda: made.append(len(features)))
            return features

    drawn = draw(Apart(), 16, num_steps=16, **options)
    np.testing.assert_array_equal(drawn, draw(EXACT, 16, num_steps=16, **options))
    rounds = 64 / 8 + 16 if not options else 64 / 8 * 16  # by score, all masks of each step
    assert len(made) <= rounds * (1 + ("guidance" in options))
    assert set(made) == {8}  # of 16 * 4 places


def test_a_network_that_writes_left_to_right_and_a_prompt_of_numbers_are_refused() -> None:
    class Causal:
        block_size = 2

        def __call__(self, x_t: jax.Array, t: jax.Array) -> jax.Array:
            return EXACT(x_t, t)

    options = {"shape": (2, LENGTH), "mask_id": MASK_ID, "schedule": make_schedule("linear"), "num_steps": 1}
    with pytest.raises(ValueError, match="writes left to right"):
        sample(Causal(), KEY, **options)
    for prompt in (3, np.array([0.5, 1.0])):
        with pytest.raises(ValueError, match="prompt is one row of token ids"):  # without checks of types
            inspect.unwrap(diffusion_tokens._start)(prompt, (2, LENGTH), MASK_ID)
    with pytest.raises(ValueError, match="scores 5 ids cannot have 9"):
        sample(EXACT, KEY, **{**options, "mask_id": 9})
