import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanodlm.diffusion.cross_entropy import predictable
from nanodlm.diffusion.noise import Times, low_discrepancy, mask_subset, q_sample, unmask_probability
from nanodlm.diffusion.schedules import make_schedule

KEY = jax.random.key(5)


# 49 and 98 are where arange(0, 1, 1 / n) has n + 1 values.
@pytest.mark.parametrize(("n", "times"), [(1, "systematic"), (49, "systematic"), (98, "stratified")])
def test_low_discrepancy_puts_one_uniform_point_in_each_interval(n: int, times: Times) -> None:
    draws = 2000
    points = jax.jit(jax.vmap(lambda key: low_discrepancy(key, n, times)))(jax.random.split(KEY, draws))
    points = np.asarray(points, np.float64)
    assert points.shape == (draws, n)
    assert points.min() > 0 and points.max() <= 1
    # Each point lies in an interval of its own, and the same all over that one.
    inside = np.sort(points, axis=1) * n - np.arange(n)
    assert inside.min() > -1e-4 and inside.max() < 1 + 1e-4
    distance = np.abs(np.sort(inside, axis=0) - np.arange(1, draws + 1)[:, None] / draws).max(axis=0)
    assert distance.max() < 2.4 / np.sqrt(draws)  # Kolmogorov-Smirnov, level 0.001 over a hundred points
    equal_gaps = np.ptp(inside, axis=1).max() < 1e-4
    assert equal_gaps == (times == "systematic")
    assert len(np.unique(points[:, 0])) > draws / 2


def test_q_sample_masks_tokens_independently_at_rate_one_minus_alpha_and_leaves_the_others() -> None:
    rate, length = np.array([0, 0.02, 0.2, 0.5, 0.9, 1]), 40_000
    x_0 = jax.random.randint(jax.random.key(1), (6, length), 0, 9)
    x_t = np.asarray(q_sample(x_0, jnp.asarray(rate, jnp.float32), KEY, mask_id=9))
    masked = x_t == 9
    assert (np.abs(masked.mean(axis=1) - rate) <= 4 * np.sqrt(rate * (1 - rate) / length)).all()
    assert (masked | (x_t == np.asarray(x_0))).all()
    assert x_t.dtype == x_0.dtype
    neighbours = np.corrcoef(masked[1:5].reshape(-1, length // 2, 2)[3].T)[0, 1]
    assert abs(neighbours) < 4 / np.sqrt(length / 2)


def test_mask_subset_masks_exactly_count_positions_every_subset_equally_often() -> None:
    x_0 = jnp.tile(jnp.arange(9), (10, 1))
    x_t = mask_subset(x_0, jnp.arange(10), KEY, mask_id=9)
    np.testing.assert_array_equal((x_t == 9).sum(axis=1), np.arange(10))
    assert bool(((x_t == x_0) | (x_t == 9)).all())
    draws = 30_000
    masked = np.asarray(mask_subset(jnp.zeros((draws, 5), jnp.int32), jnp.full(draws, 2), KEY, mask_id=1))
    seen, times = np.unique(masked @ (1 << np.arange(5)), return_counts=True)
    assert len(seen) == 10
    expected = draws / 10
    assert ((times - expected) ** 2 / expected).sum() < 27.9  # chi-square, 9 degrees of freedom, level 0.001


@pytest.mark.parametrize(("kind", "exponent"), [("cosine", 2.0), ("sqrt", 2.0), ("poly", 0.3), ("poly", 20.0)])
def test_unmask_probability_is_the_share_of_the_mask_rate_that_goes(kind: str, exponent: float) -> None:
    schedule, grid = make_schedule(kind, exponent=exponent), jnp.arange(201) / 200
    p = np.asarray(unmask_probability(schedule, grid[1:], grid[:-1]))
    assert ((p >= 0) & (p <= 1)).all()
    alpha = np.asarray(schedule.alpha(grid), np.float64)
    exact = 1 - alpha[1:] > 0.02  # 1 - alpha has not cancelled there
    np.testing.assert_allclose(p[exact], (alpha[:-1] - alpha[1:])[exact] / (1 - alpha[1:])[exact], rtol=2e-3, atol=1e-6)
    # At time zero it is exactly 1, wherever t is; step by step it leaves the schedule's share masked.
    np.testing.assert_array_equal(unmask_probability(schedule, jnp.float32([1, 0.5, 2**-24]), jnp.zeros(3)), 1.0)
    np.testing.assert_allclose(np.cumprod((1 - p)[::-1]), 1 - alpha[:-1][::-1], atol=1e-4)


def test_predictable_rules_out_the_mask_and_all_ids_after_it_in_float32() -> None:
    logits = jax.random.normal(KEY, (2, 3, 8)) + 100 * (jnp.arange(8) >= 5)
    p = jax.nn.softmax(predictable(logits, mask_id=5))
    np.testing.assert_array_equal(p[..., 5:], 0.0)
    np.testing.assert_allclose(p[..., :5], jax.nn.softmax(logits[..., :5]), rtol=1e-6)
    kept = predictable(jnp.asarray([[1.5, -2.0, 3.0]], jnp.bfloat16), mask_id=2)
    assert kept.dtype == jnp.float32
    np.testing.assert_array_equal(kept, [[1.5, -2.0, -np.inf]])
