"""The bound of a denoiser with exact conditionals is -log p(x_0) itself, so every estimator has a known mean."""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from nanodlm.diffusion import unmask_probability
from nanodlm.losses import Denoise, Estimator, corrupt, masked_cross_entropy, nelbo
from nanodlm.schedules import make_schedule
from tests.laws import (
    MASK_ID,
    TOKENS,
    VOCAB,
    entropy,
    exact_denoiser,
    markov_table,
    mean_residual,
    residuals,
    sequences,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

LENGTH = 8
TABLE = markov_table(LENGTH)
ENTROPY = entropy(TABLE)
EXACT = exact_denoiser(TABLE)
KINDS = ("linear", "cosine", "sqrt", "poly")
UNBIASED: list[tuple[Estimator, str]] = [("count", "linear"), *(("continuous", kind) for kind in KINDS)]
BATCHES, ROWS = 64, 512


def wrong(x_t: jax.Array, t: jax.Array) -> jax.Array:
    """A denoiser that sees only the token before and gets it wrong."""
    table = jnp.asarray(np.random.default_rng(1).normal(size=(VOCAB, VOCAB)), jnp.float32)
    return table[jnp.roll(x_t, 1, axis=1)]


def uniform(x_t: jax.Array, t: jax.Array) -> jax.Array:
    return jnp.zeros((*x_t.shape, VOCAB))


SETTINGS = ("schedule", "mask_id", "estimator", "num_timesteps")
fast_corrupt = jax.jit(corrupt, static_argnames=SETTINGS)
fast_nelbo = jax.jit(nelbo, static_argnames=("denoise", *SETTINGS))


class Draws(NamedTuple):
    """What nelbo gave, (BATCHES, ROWS): its values, the times, and -log p(x_0) of the rows."""

    nats: np.ndarray
    t: np.ndarray
    surprise: np.ndarray


@partial(jax.jit, static_argnames=("denoise", "estimator", "kind", "num_timesteps", "x_0"))
def _draw(
    keys: jax.Array, *, denoise: Denoise, estimator: Estimator, kind: str, num_timesteps: int, x_0: tuple[int, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    every, table = jnp.asarray(sequences(LENGTH)), jnp.asarray(TABLE.reshape(-1), jnp.float32)
    noise = {
        "schedule": make_schedule(kind),
        "mask_id": MASK_ID,
        "estimator": estimator,
        "num_timesteps": num_timesteps,
    }

    def batch(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        data_key, noise_key = jax.random.split(key)
        # The inverse of the distribution function is much less work than Gumbel noise on 6,561 classes.
        which = jnp.searchsorted(jnp.cumsum(table), jax.random.uniform(data_key, (ROWS,)))
        which = jnp.full(ROWS, np.ravel_multi_index(x_0, TABLE.shape)) if x_0 else which
        nats = nelbo(denoise, every[which], noise_key, **noise)
        return nats, corrupt(every[which], noise_key, **noise).t, -jnp.log(table[which])

    return jax.vmap(batch)(keys)


@cache
def draws(
    denoise: Denoise,
    estimator: Estimator,
    kind: str = "linear",
    *,
    num_timesteps: int = 10,
    x_0: tuple[int, ...] = (),
) -> Draws:
    """Estimates of the bound for rows drawn from the chain, or for copies of one row."""
    options = {"denoise": denoise, "estimator": estimator, "kind": kind, "num_timesteps": num_timesteps, "x_0": x_0}
    return Draws(*(np.asarray(a, np.float64) for a in _draw(jax.random.split(jax.random.key(0), BATCHES), **options)))


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean, and its standard error from the batches' means, since the rows of a batch share their times."""
    means = values.mean(axis=1)
    return float(means.mean()), float(means.std(ddof=1) / np.sqrt(len(means)))


def discrete_bound(kind: str, num_timesteps: int) -> float:
    """The exact denoiser's discrete bound, summed over the steps and over how many positions are masked."""
    steps = jnp.arange(1, num_timesteps + 1)
    t, s = steps / num_timesteps, (steps - 1) / num_timesteps
    schedule = make_schedule(kind)
    probability = np.asarray(unmask_probability(schedule, t, s), np.float64)
    return float((probability * mean_residual(TABLE, np.asarray(schedule.mask_rate(t)))).sum())


def test_the_closed_form_denoiser_agrees_with_enumeration() -> None:
    x_0, pattern = sequences(4), np.int32([1, MASK_ID, MASK_ID, 0])
    p = markov_table(4).reshape(-1) * ((x_0 == pattern) | (pattern == MASK_ID)).all(axis=1)
    logits = exact_denoiser(markov_table(4))(jnp.asarray(pattern[None]), jnp.ones(1))
    assert logits.shape == (1, 4, VOCAB)
    for i in (1, 2):
        expected = np.bincount(x_0[:, i], weights=p) / p.sum()
        np.testing.assert_allclose(jax.nn.softmax(logits[0, i, :TOKENS]), expected, atol=1e-6)


def test_the_chains_entropy_is_the_sum_of_its_residuals_over_mask_counts() -> None:
    assert (residuals(TABLE)[1:] / np.arange(1, LENGTH + 1)).sum() == pytest.approx(ENTROPY, abs=1e-9)


def continuous_bound(kind: str, earliest: float = 0.0) -> float:
    """The exact denoiser's continuous bound from times after `earliest`, integrated by Gauss-Legendre."""
    # Over u = t^(1/2), which takes away the square-root schedule's edge.
    nodes, weights = np.polynomial.legendre.leggauss(40)
    first = np.sqrt(earliest)
    u = first + (1 - first) * (nodes + 1) / 2
    t, schedule = jnp.asarray(u**2, jnp.float32), make_schedule(kind)
    integrand = np.asarray(schedule.weight(t), np.float64) * mean_residual(TABLE, np.asarray(schedule.mask_rate(t)))
    return float((weights * (1 - first) * u * integrand).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_integrates_the_residuals_to_the_entropy(kind: str) -> None:
    assert continuous_bound(kind) == pytest.approx(ENTROPY, abs=1e-5)


@pytest.mark.parametrize(("estimator", "kind"), UNBIASED)
def test_the_bound_of_exact_conditionals_is_the_entropy(estimator: Estimator, kind: str) -> None:
    drawn = draws(EXACT, estimator, kind)
    mean, error = mean_and_error(drawn.nats)
    assert abs(mean - ENTROPY) < 4 * error
    # The entropy of the rows that were drawn removes much of the noise.
    gap, error = mean_and_error(drawn.nats - drawn.surprise)
    assert abs(gap) < 4 * error
    assert estimator == "continuous" or error < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_the_continuous_bound_is_right_after_the_times_near_zero(kind: str) -> None:
    # Few masks with large weights near 0 give the whole mean a variance too large for a sharp test.
    drawn = draws(EXACT, "continuous", kind)
    mean, error = mean_and_error(drawn.nats * (drawn.t > 0.04))
    assert error < 0.04
    assert abs(mean - continuous_bound(kind, 0.04)) < 4 * error


@pytest.mark.parametrize("x_0", [(0,) * 8, (2, 1, 0, 2, 1, 0, 2, 1)])
def test_the_bound_of_exact_conditionals_is_minus_log_p_of_each_sequence(x_0: tuple[int, ...]) -> None:
    drawn = draws(EXACT, "count", x_0=x_0)
    mean, error = mean_and_error(drawn.nats)
    assert error < 0.03
    assert abs(mean + np.log(TABLE[x_0])) < 4 * error


def test_discrete_bounds_exceed_the_entropy_and_fall_to_it() -> None:
    for kind in ("linear", "cosine"):
        gaps = [discrete_bound(kind, steps) - ENTROPY for steps in (10, 100, 1000)]
        assert (np.diff(gaps) < 0).all()
        assert gaps[0] > 0.01
        assert 0 < gaps[-1] < 5e-3


@pytest.mark.parametrize(("kind", "num_timesteps"), [("linear", 1), ("cosine", 4), ("sqrt", 4)])
def test_the_discrete_estimator_has_the_mean_that_enumeration_gives(kind: str, num_timesteps: int) -> None:
    drawn = draws(EXACT, "discrete", kind, num_timesteps=num_timesteps)
    gap, error = mean_and_error(drawn.nats - drawn.surprise)
    expected = discrete_bound(kind, num_timesteps) - ENTROPY
    assert abs(gap - expected) < 4 * error
    assert gap > 4 * error  # it is told apart from the continuous bound


def test_counts_vary_less_than_continuous_times() -> None:
    count, continuous = draws(EXACT, "count"), draws(EXACT, "continuous")
    assert 5 * (count.nats - count.surprise).var() < (continuous.nats - continuous.surprise).var()
    assert 5 * count.nats.mean(axis=1).var() < continuous.nats.mean(axis=1).var()


@pytest.mark.parametrize("kind", ["linear", "poly"])
def test_counts_and_continuous_times_agree_on_any_denoiser_that_ignores_time(kind: str) -> None:
    count, count_error = mean_and_error(draws(wrong, "count").nats)
    continuous, continuous_error = mean_and_error(draws(wrong, "continuous", kind).nats)
    assert abs(count - continuous) < 4 * np.hypot(count_error, continuous_error)
    assert count > ENTROPY + 1


@pytest.mark.parametrize("length", [1, 8, 20])
def test_the_bound_is_in_nats_per_sequence(length: int) -> None:
    x_0 = jnp.zeros((16, length), jnp.int32)
    options = {"schedule": make_schedule("cosine"), "mask_id": MASK_ID, "estimator": "count"}
    nats = fast_nelbo(uniform, x_0, jax.random.key(3), **options)
    np.testing.assert_allclose(nats, length * np.log(TOKENS), rtol=1e-5)


def test_a_continuous_estimate_is_the_weight_times_the_sum_over_masked_positions() -> None:
    schedule = make_schedule("linear")
    x_0 = jax.random.randint(jax.random.key(1), (32, LENGTH), 0, TOKENS)
    noised = fast_corrupt(x_0, jax.random.key(2), schedule=schedule, mask_id=MASK_ID)
    nats = fast_nelbo(uniform, x_0, jax.random.key(2), schedule=schedule, mask_id=MASK_ID)
    np.testing.assert_allclose(nats, (noised.x_t == MASK_ID).sum(axis=1) * np.log(TOKENS) / noised.t, rtol=1e-5)


@pytest.mark.parametrize("estimator", ["continuous", "discrete", "count"])
def test_corruption_draws_times_in_range_and_of_low_discrepancy(estimator: Estimator) -> None:
    rows = 64
    noised = fast_corrupt(
        jnp.zeros((rows, 64), jnp.int32),
        jax.random.key(0),
        schedule=make_schedule("sqrt"),
        mask_id=MASK_ID,
        estimator=estimator,
        num_timesteps=rows,
    )
    t = np.sort(np.asarray(noised.t, np.float64))
    assert t.min() > 0 and t.max() <= 1
    if estimator == "continuous":
        np.testing.assert_allclose(np.diff(t), 1 / rows, atol=1e-6)
    elif estimator == "discrete":
        np.testing.assert_allclose(t, np.arange(1, rows + 1) / rows, atol=1e-6)
    else:
        np.testing.assert_array_equal(np.sort((noised.x_t == MASK_ID).sum(axis=1)), np.arange(1, rows + 1))
        np.testing.assert_allclose(t, (np.arange(1, rows + 1) / rows) ** 2, rtol=1e-5)


def test_counts_tell_the_network_the_time_at_which_that_share_is_masked() -> None:
    schedule = make_schedule("cosine")
    noised = fast_corrupt(
        jnp.zeros((32, 10), jnp.int32), jax.random.key(0), schedule=schedule, mask_id=MASK_ID, estimator="count"
    )
    share = (noised.x_t == MASK_ID).mean(axis=1)
    np.testing.assert_allclose(schedule.mask_rate(noised.t), share, rtol=1e-5)
    np.testing.assert_allclose(noised.weight, 1 / share, rtol=1e-6)


def test_logits_of_mask_and_padding_change_nothing() -> None:
    def louder(x_t: jax.Array, t: jax.Array) -> jax.Array:
        return wrong(x_t, t) + 1e4 * (jnp.arange(VOCAB) >= MASK_ID)

    x_0 = jax.random.randint(jax.random.key(1), (64, LENGTH), 0, TOKENS)
    options = {"schedule": make_schedule("linear"), "mask_id": MASK_ID}
    quiet, loud = (fast_nelbo(f, x_0, jax.random.key(0), **options) for f in (wrong, louder))
    np.testing.assert_array_equal(quiet, loud)
    assert float(quiet.max()) > 0


def test_cross_entropy_sums_over_masked_positions_only() -> None:
    logits = jnp.log(jnp.asarray([[[0.5, 0.25, 0.25], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6]]]))
    logits = jnp.pad(logits, ((0, 0), (0, 0), (0, 2)))
    x_0 = jnp.asarray([[1, 2, 2]])
    for masked, expected in (([0, 2], -np.log(0.25 * 0.6)), ([1], -np.log(0.3)), ([], 0.0)):
        x_t = x_0.at[0, jnp.asarray(masked, jnp.int32)].set(MASK_ID)
        nats = masked_cross_entropy(logits, x_0, x_t, mask_id=MASK_ID)
        np.testing.assert_allclose(nats, [expected], rtol=1e-5)


def test_cross_entropy_takes_its_softmax_in_float32() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 64, VOCAB)), jnp.bfloat16)
    x_0, x_t = jnp.zeros((2, 64), jnp.int32), jnp.full((2, 64), MASK_ID)
    nats = masked_cross_entropy(logits, x_0, x_t, mask_id=MASK_ID)
    exact = np.asarray(logits.astype(jnp.float32), np.float64)[..., :TOKENS]
    assert nats.dtype == jnp.float32
    np.testing.assert_allclose(nats, (np.log(np.exp(exact).sum(-1)) - exact[..., 0]).sum(-1), rtol=1e-5)


@pytest.mark.parametrize("kind", ["sqrt", "steep"])
@pytest.mark.parametrize("estimator", ["continuous", "discrete", "count"])
def test_the_loss_and_its_gradient_are_finite_when_almost_nothing_is_masked(estimator: Estimator, kind: str) -> None:
    schedule = make_schedule("poly", exponent=20.0) if kind == "steep" else make_schedule(kind)
    x_0 = jnp.zeros((2048, 2), jnp.int32)

    @jax.jit
    def mean(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        nats = fast_nelbo(
            lambda x_t, t: jnp.broadcast_to(logits, (*x_t.shape, VOCAB)),
            x_0,
            jax.random.key(0),
            schedule=schedule,
            mask_id=MASK_ID,
            estimator=estimator,
            num_timesteps=2**14,
        )
        return nats.mean(), nats.min()

    (value, least), gradient = jax.value_and_grad(mean, has_aux=True)(jnp.zeros(VOCAB))
    assert float(value) > 0 and bool(jnp.isfinite(value))
    assert bool(jnp.isfinite(gradient).all())
    assert estimator == "count" or float(least) == 0  # a row without any mask was among them


def test_an_unknown_estimator_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"unknown estimator 'exact': choose continuous, discrete or count"):
        # Unwrapped: with types checked, the annotation would refuse it first.
        unchecked(corrupt)(
            jnp.zeros((1, 2), jnp.int32),
            jax.random.key(0),
            schedule=make_schedule("linear"),
            mask_id=1,
            estimator="exact",
        )


def unchecked(function: Callable[..., object]) -> Callable[..., object]:
    """The function itself, without the checks of types that tests put around it."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


@pytest.mark.parametrize("estimator", ["continuous", "discrete", "count"])
def test_the_gradient_of_a_linear_denoiser_agrees_with_finite_differences(estimator: Estimator) -> None:
    x_0 = jax.random.randint(jax.random.key(1), (16, LENGTH), 0, TOKENS)

    @jax.jit
    def mean(weights: jax.Array) -> jax.Array:
        def linear(x_t: jax.Array, t: jax.Array) -> jax.Array:
            return jax.nn.one_hot(jnp.roll(x_t, 1, axis=1), VOCAB) @ weights

        return fast_nelbo(
            linear,
            x_0,
            jax.random.key(0),
            schedule=make_schedule("cosine"),
            mask_id=MASK_ID,
            estimator=estimator,
            num_timesteps=10,
        ).mean()

    weights = jax.random.normal(jax.random.key(2), (VOCAB, VOCAB))
    jax.test_util.check_grads(mean, (weights,), order=1, modes=["rev"], atol=5e-3, rtol=5e-3, eps=1e-2)
    gradient = jax.grad(mean)(weights)
    assert float(jnp.abs(gradient[:, :TOKENS]).max()) > 0.1
    np.testing.assert_array_equal(gradient[:, TOKENS:], 0.0)


@pytest.mark.parametrize("kind", ["cosine", "sqrt", "poly"])
def test_the_schedule_does_not_touch_what_counts_mask_and_weigh(kind: str) -> None:
    x_0, key = jnp.zeros((16, LENGTH), jnp.int32), jax.random.key(4)
    linear, other = (
        fast_corrupt(x_0, key, schedule=make_schedule(k), mask_id=MASK_ID, estimator="count") for k in ("linear", kind)
    )
    np.testing.assert_array_equal(linear.x_t, other.x_t)
    np.testing.assert_array_equal(linear.weight, other.weight)
    assert bool((linear.t != other.t).any())


def test_the_same_key_gives_the_same_estimates_and_another_does_not() -> None:
    x_0 = jnp.zeros((8, LENGTH), jnp.int32)
    options = {"schedule": make_schedule("linear"), "mask_id": MASK_ID}
    first, again, other = (fast_nelbo(uniform, x_0, jax.random.key(seed), **options) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert bool((first != other).any())
