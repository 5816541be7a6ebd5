import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanodlm.diffusion.schedules import KINDS, Schedule, make_schedule

POWERS = [("linear", 2.0), ("cosine", 2.0), ("sqrt", 2.0), ("poly", 2.0), ("poly", 0.3), ("poly", 3.5)]
JUMPING = [("loglinear", 2.0), ("linear_clipped", 2.0), ("cosine_clipped", 2.0), ("sqrt_clipped", 2.0)]
SCHEDULES = POWERS + JUMPING
EPS = {"loglinear": 1e-3}
every_schedule = pytest.mark.parametrize(("kind", "exponent"), SCHEDULES)


def exact_mask_rate(kind: str, exponent: float, t: np.ndarray) -> np.ndarray:
    """1 - alpha(t) in float64, from the table in the docstring."""
    power, eps = {"linear": 1.0, "sqrt": 0.5, "poly": exponent}, EPS.get(kind, 1e-4)
    if kind == "cosine":
        return np.sin(np.pi / 2 * t)
    if kind in ("loglinear", "linear_clipped"):
        return t * (1 - eps)
    if kind == "sqrt_clipped":
        return np.clip(np.sqrt(t + eps), eps, 1 - eps)
    if kind == "cosine_clipped":
        f = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.clip(1 - f / np.cos(0.008 / 1.008 * np.pi / 2) ** 2, eps, 1 - eps)
    return t ** power[kind]


def exact_slope(kind: str, exponent: float, t: np.ndarray) -> np.ndarray:
    """Its derivative in float64."""
    power, eps = {"linear": 1.0, "sqrt": 0.5, "poly": exponent}, EPS.get(kind, 1e-4)
    if kind == "cosine":
        return np.pi / 2 * np.cos(np.pi / 2 * t)
    if kind in ("loglinear", "linear_clipped"):
        return np.full_like(t, 1 - eps)
    rate = exact_mask_rate(kind, exponent, t)
    inside = (rate > eps) & (rate < 1 - eps)
    if kind == "sqrt_clipped":
        return np.where(inside, 0.5 / np.sqrt(t + eps), 0)
    if kind == "cosine_clipped":
        angle, first = (t + 0.008) / 1.008 * np.pi / 2, 0.008 / 1.008 * np.pi / 2
        return np.where(inside, np.pi / 2 / 1.008 * np.sin(2 * angle) / np.cos(first) ** 2, 0)
    return power[kind] * t ** (power[kind] - 1)


def schedule_of(kind: str, exponent: float) -> Schedule:
    return make_schedule(kind, exponent=exponent)


def test_every_named_kind_is_covered_here() -> None:
    assert {kind for kind, _ in SCHEDULES} == set(KINDS)


@pytest.mark.parametrize(("kind", "exponent"), POWERS)
def test_alpha_is_exactly_one_at_time_zero_and_zero_at_time_one(kind: str, exponent: float) -> None:
    schedule = schedule_of(kind, exponent)
    assert float(schedule.alpha(0.0)) == 1.0
    assert float(schedule.alpha(1.0)) == 0.0
    assert schedule.kind == kind


@pytest.mark.parametrize(("kind", "exponent"), JUMPING)
def test_the_ends_of_a_schedule_that_jumps_are_those_it_names(kind: str, exponent: float) -> None:
    schedule = schedule_of(kind, exponent)
    np.testing.assert_allclose(schedule.mask_rate(jnp.float32(0)), schedule.start, rtol=1e-5)
    np.testing.assert_allclose(schedule.mask_rate(jnp.float32(1)), schedule.end, rtol=1e-6)
    assert schedule.start == pytest.approx(exact_mask_rate(kind, exponent, np.float64(0)))
    assert schedule.end == pytest.approx(exact_mask_rate(kind, exponent, np.float64(1)))
    assert schedule.end < 1 - 5e-5


@pytest.mark.parametrize("eps", [0.0, 0.5, -1e-3])
def test_an_eps_out_of_range_is_refused(eps: float) -> None:
    with pytest.raises(ValueError, match=r"eps of a schedule must lie between 0 and 0\.5"):
        make_schedule("loglinear", eps=eps)


@every_schedule
def test_alpha_never_rises_and_stays_a_probability(kind: str, exponent: float) -> None:
    alpha = np.asarray(schedule_of(kind, exponent).alpha(jnp.linspace(0, 1, 1001)))
    # By one rounding step at most, which float32 powers may take.
    assert np.diff(alpha).max() <= 2**-23
    assert np.diff(alpha[::50]).max() < 0
    assert alpha.min() >= 0 and alpha.max() <= 1


@every_schedule
def test_alpha_follows_its_formula(kind: str, exponent: float) -> None:
    t = np.linspace(0, 1, 257)
    np.testing.assert_allclose(
        schedule_of(kind, exponent).alpha(jnp.asarray(t, jnp.float32)),
        1 - exact_mask_rate(kind, exponent, t),
        atol=4e-7,
    )


@every_schedule
def test_dalpha_is_the_derivative_of_alpha_and_never_positive(kind: str, exponent: float) -> None:
    schedule = schedule_of(kind, exponent)
    t = jnp.linspace(0.02, 0.98, 49)
    np.testing.assert_allclose(schedule.dalpha(t), jax.vmap(jax.grad(schedule.alpha))(t), rtol=2e-5, atol=1e-6)
    h = 2.0**-8
    difference = (schedule.alpha(t[8:] + h) - schedule.alpha(t[8:] - h)) / (2 * h)
    np.testing.assert_allclose(schedule.dalpha(t[8:]), difference, rtol=2e-3)
    assert float(schedule.dalpha(jnp.linspace(1e-6, 1, 1001)).max()) <= 0


@every_schedule
def test_weight_is_minus_dalpha_over_one_minus_alpha(kind: str, exponent: float) -> None:
    schedule = schedule_of(kind, exponent)
    t = np.float32([2**-20, 1e-4, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9])
    expected = exact_slope(kind, exponent, t.astype(np.float64)) / exact_mask_rate(kind, exponent, t.astype(np.float64))
    np.testing.assert_allclose(schedule.weight(jnp.asarray(t)), expected, rtol=2e-5)
    t = jnp.asarray(t[4:])
    quotient = -schedule.dalpha(t) / (1 - schedule.alpha(t))
    np.testing.assert_allclose(schedule.weight(t), quotient, rtol=1e-5)


@every_schedule
def test_weight_is_finite_and_not_negative_on_all_times_that_are_drawn(kind: str, exponent: float) -> None:
    weight = schedule_of(kind, exponent).weight(jnp.float32([2**-24, 2**-23, 1e-3, 0.5, 1 - 2**-24, 1.0]))
    assert bool(jnp.isfinite(weight).all())
    assert float(weight.min()) >= 0


def test_weight_stays_a_number_where_a_steep_mask_rate_underflows() -> None:
    schedule = make_schedule("poly", exponent=20.0)
    weight = schedule.weight(jnp.float32([1e-4, 1e-2, 0.5]))
    assert bool(jnp.isfinite(weight).all())
    assert float(weight[2]) == pytest.approx(40.0, rel=1e-5)


@every_schedule
def test_mask_rate_keeps_float32_accuracy_near_time_zero(kind: str, exponent: float) -> None:
    schedule = schedule_of(kind, exponent)
    t = np.float32([2**-24, 1e-6, 1e-5, 1e-3])
    exact = exact_mask_rate(kind, exponent, t.astype(np.float64))
    np.testing.assert_allclose(schedule.mask_rate(jnp.asarray(t)), exact, rtol=3e-6)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.sampled_from(SCHEDULES), st.floats(0, 1, width=32, allow_subnormal=False))
def test_time_of_inverts_the_mask_rate(which: tuple[str, float], share: float) -> None:
    schedule = schedule_of(*which)
    t = schedule.time_of(jnp.float32(share))
    assert 0 <= float(t) <= 1
    reached = min(max(share, schedule.start), schedule.end)
    assert float(schedule.mask_rate(t)) == pytest.approx(reached, abs=2e-6)


@every_schedule
def test_mask_rate_inverts_time_of(kind: str, exponent: float) -> None:
    schedule = schedule_of(kind, exponent)
    t = jnp.linspace(0.1, 0.95, 40)
    np.testing.assert_allclose(schedule.time_of(schedule.mask_rate(t)), t, atol=2e-5)
    assert float(schedule.time_of(jnp.float32(1))) == pytest.approx(1, abs=1e-7)
    assert float(schedule.time_of(jnp.float32(0))) == 0


def test_the_exponent_changes_poly_alone() -> None:
    t = jnp.float32(0.3)
    for kind in ("linear", "cosine", "sqrt"):
        assert float(schedule_of(kind, 2.0).alpha(t)) == float(schedule_of(kind, 5.0).alpha(t))
    assert float(schedule_of("poly", 2.0).alpha(t)) != float(schedule_of("poly", 5.0).alpha(t))


def test_poly_has_linear_and_sqrt_as_special_cases() -> None:
    t = jnp.linspace(0.01, 1, 50)
    for kind, exponent in (("linear", 1.0), ("sqrt", 0.5)):
        np.testing.assert_array_equal(make_schedule(kind).weight(t), schedule_of("poly", exponent).weight(t))


def test_an_unknown_kind_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"unknown schedule 'cubic': choose one of linear, cosine, sqrt, poly"):
        make_schedule("cubic")


@pytest.mark.parametrize("exponent", [0.0, -1.0])
def test_an_exponent_that_is_not_positive_is_refused(exponent: float) -> None:
    with pytest.raises(ValueError, match=rf"exponent of a poly schedule must be positive, not {exponent}"):
        make_schedule("poly", exponent=exponent)
