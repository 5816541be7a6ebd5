import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanodlm.diffusion.cross_entropy import predictable
from nanodlm.diffusion.noise import low_discrepancy, mask_subset, q_sample, unmask_probability
from nanodlm.diffusion.schedules import make_schedule

KEY = jax.random.key(5)
# 49 and 98 are where arange(0, 1, 1 / n) has n + 1 values.
SIZES = [1, 2, 7, 16, 49, 98, 512]


@pytest.mark.parametrize("n", SIZES)
def test_low_discrepancy_puts_one_point_in_each_interval(n: int) -> None:
    points = np.asarray(jax.vmap(lambda key: low_discrepancy(key, n))(jax.random.split(KEY, 50)), np.float64)
    assert points.shape == (50, n)
    assert points.min() > 0 and points.max() <= 1
    # Equal gaps, and a first point inside the first interval: so each interval has exactly one.
    ordered = np.sort(points, axis=1)
    np.testing.assert_allclose(ordered, ordered[:, :1] + np.arange(n) / n, atol=3e-7)
    assert ordered[:, 0].max() <= 1 / n + 3e-7


def test_low_discrepancy_is_in_the_half_open_interval_for_all_offsets() -> None:
    points = jax.vmap(lambda key: low_discrepancy(key, 3))(jax.random.split(KEY, 20_000))
    assert float(points.min()) > 0
    assert float(points.max()) <= 1


def test_each_low_discrepancy_point_is_uniform_by_itself() -> None:
    draws = 4000
    points = np.asarray(jax.vmap(lambda key: low_discrepancy(key, 5))(jax.random.split(KEY, draws)), np.float64)
    ordered = np.sort(points, axis=0)
    distance = np.abs(ordered - np.arange(1, draws + 1)[:, None] / draws).max(axis=0)
    assert distance.max() < 1.95 / np.sqrt(draws)  # Kolmogorov-Smirnov, level 0.001


def test_low_discrepancy_offsets_depend_on_the_key() -> None:
    first, again, other = (low_discrepancy(jax.random.key(seed), 8) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert float(jnp.abs(first - other).max()) > 1e-3


def test_q_sample_masks_at_rate_one_minus_alpha() -> None:
    schedule = make_schedule("cosine")
    t = jnp.float32([0.02, 0.2, 0.5, 0.9])
    length = 40_000
    x_t = q_sample(jnp.zeros((4, length), jnp.int32), 1 - schedule.alpha(t), KEY, mask_id=9)
    rate = np.sin(np.pi / 2 * np.asarray(t, np.float64))
    error = np.sqrt(rate * (1 - rate) / length)
    assert (np.abs(np.asarray((x_t == 9).mean(axis=1)) - rate) < 4 * error).all()


def test_q_sample_masks_positions_independently() -> None:
    masked = np.asarray(q_sample(jnp.zeros((40_000, 3), jnp.int32), jnp.full(40_000, 0.3), KEY, mask_id=1))
    correlation = np.corrcoef(masked.T)[np.triu_indices(3, 1)]
    assert np.abs(correlation).max() < 4 / np.sqrt(40_000)


def test_q_sample_leaves_every_other_token_as_it_is() -> None:
    x_0 = jax.random.randint(jax.random.key(1), (64, 32), 0, 9)
    x_t = q_sample(x_0, jnp.linspace(0, 1, 64), KEY, mask_id=9)
    assert bool(((x_t == x_0) | (x_t == 9)).all())
    assert 0 < int((x_t == 9).sum()) < x_t.size
    assert x_t.dtype == x_0.dtype


def test_q_sample_masks_nothing_at_rate_zero_and_everything_at_rate_one() -> None:
    x_0 = jax.random.randint(jax.random.key(1), (2, 5000), 0, 9)
    x_t = q_sample(x_0, jnp.float32([0, 1]), KEY, mask_id=9)
    np.testing.assert_array_equal(x_t[0], x_0[0])
    assert bool((x_t[1] == 9).all())


@pytest.mark.parametrize("length", [1, 2, 9, 64])
def test_mask_subset_masks_exactly_count_positions(length: int) -> None:
    x_0 = jnp.tile(jnp.arange(length), (length + 1, 1))
    for seed in range(5):
        x_t = mask_subset(x_0, jnp.arange(length + 1), jax.random.key(seed), mask_id=length)
        np.testing.assert_array_equal((x_t == length).sum(axis=1), np.arange(length + 1))
        assert bool(((x_t == x_0) | (x_t == length)).all())


def test_mask_subset_takes_every_subset_equally_often() -> None:
    draws = 30_000
    masked = np.asarray(mask_subset(jnp.zeros((draws, 5), jnp.int32), jnp.full(draws, 2), KEY, mask_id=1))
    seen, times = np.unique(masked @ (1 << np.arange(5)), return_counts=True)
    assert len(seen) == 10
    expected = draws / 10
    assert ((times - expected) ** 2 / expected).sum() < 27.9  # chi-square, 9 degrees of freedom, level 0.001


def test_unmask_probability_is_the_share_of_the_mask_rate_that_goes() -> None:
    t, s = jnp.float32([1.0, 0.8, 0.3]), jnp.float32([0.6, 0.3, 0.1])
    for kind in ("linear", "cosine", "sqrt", "poly"):
        schedule = make_schedule(kind, exponent=1.5)
        expected = (schedule.alpha(s) - schedule.alpha(t)) / (1 - schedule.alpha(t))
        np.testing.assert_allclose(unmask_probability(schedule, t, s), expected, rtol=1e-5)
    np.testing.assert_allclose(unmask_probability(make_schedule("linear"), t, s), [0.4, 0.625, 2 / 3], rtol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "cosine", "sqrt", "poly"])
@pytest.mark.parametrize("exponent", [0.3, 2.0, 20.0])
def test_unmask_probability_is_exactly_one_at_time_zero(kind: str, exponent: float) -> None:
    t = jnp.float32([1, 0.5, 1e-3, 2**-24])
    np.testing.assert_array_equal(unmask_probability(make_schedule(kind, exponent=exponent), t, jnp.zeros(4)), 1.0)


@pytest.mark.parametrize("kind", ["linear", "cosine", "sqrt", "poly"])
@pytest.mark.parametrize("exponent", [0.3, 2.0, 20.0])
def test_unmask_probability_is_a_probability_on_the_samplers_grid(kind: str, exponent: float) -> None:
    grid = jnp.arange(201) / 200
    p = unmask_probability(make_schedule(kind, exponent=exponent), grid[1:], grid[:-1])
    assert bool(((p >= 0) & (p <= 1)).all())


def test_unmasking_step_by_step_leaves_the_schedules_share_masked() -> None:
    schedule = make_schedule("cosine")
    grid = jnp.linspace(1, 0, 33)
    left = jnp.cumprod(1 - unmask_probability(schedule, grid[:-1], grid[1:]))
    np.testing.assert_allclose(left, 1 - schedule.alpha(grid[1:]), atol=1e-5)


def test_predictable_rules_out_the_mask_and_all_ids_after_it() -> None:
    logits = jax.random.normal(KEY, (2, 3, 8)) + 100 * (jnp.arange(8) >= 5)
    p = jax.nn.softmax(predictable(logits, mask_id=5))
    np.testing.assert_array_equal(p[..., 5:], 0.0)
    np.testing.assert_allclose(p[..., :5], jax.nn.softmax(logits[..., :5]), rtol=1e-6)


def test_predictable_returns_float32_and_keeps_real_logits() -> None:
    logits = jnp.asarray([[1.5, -2.0, 3.0]], jnp.bfloat16)
    kept = predictable(logits, mask_id=2)
    assert kept.dtype == jnp.float32
    np.testing.assert_array_equal(kept, [[1.5, -2.0, -np.inf]])
