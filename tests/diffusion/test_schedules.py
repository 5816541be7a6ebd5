from functools import cache
from types import SimpleNamespace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanodlm.diffusion.kinds import ScheduleName
from nanodlm.diffusion.schedules import make_schedule

POWERS = [("linear", 2.0), ("cosine", 2.0), ("sqrt", 2.0), ("poly", 2.0), ("poly", 0.3), ("poly", 3.5)]
JUMPING = [("loglinear", 2.0), ("linear_clipped", 2.0), ("cosine_clipped", 2.0), ("sqrt_clipped", 2.0)]
SCHEDULES = POWERS + JUMPING
EPS = {"loglinear": 1e-3}
every_schedule = pytest.mark.parametrize(("kind", "exponent"), SCHEDULES)

SMALL = [0.0, 2**-24, 2**-23, 2**-20, 1e-6, 1e-5, 1e-4, 1e-3]
TIMES = np.float32([*SMALL, *np.linspace(0.02, 0.98, 97), 1 - 2**-24, 1.0])
LATER, INNER = TIMES > 0, slice(len(SMALL), -2)  # all times that are drawn, and those away from both ends


@cache
def of(kind: str, exponent: float = 2.0) -> SimpleNamespace:
    """What one schedule gives at all times, compiled once."""
    schedule = make_schedule(kind, exponent=exponent)

    @jax.jit
    def values(t: jax.Array) -> dict[str, jax.Array]:
        return {
            "rate": schedule.mask_rate(t),
            "alpha": schedule.alpha(t),
            "dalpha": schedule.dalpha(t),
            "weight": schedule.weight(t),
            "derivative": jax.vmap(jax.grad(schedule.alpha))(t),
            "time": schedule.time_of(schedule.mask_rate(t)),
            "rate_at_time": schedule.mask_rate(schedule.time_of(t)),
        }

    return SimpleNamespace(**{name: np.asarray(v, np.float64) for name, v in values(jnp.asarray(TIMES)).items()})


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


def test_every_named_kind_is_covered_here() -> None:
    assert {kind for kind, _ in SCHEDULES} == set(get_args(ScheduleName))


@pytest.mark.parametrize(("kind", "exponent"), POWERS)
def test_alpha_is_exactly_one_at_time_zero_and_zero_at_time_one(kind: str, exponent: float) -> None:
    assert (of(kind, exponent).alpha[0], of(kind, exponent).alpha[-1]) == (1, 0)


@pytest.mark.parametrize(("kind", "exponent"), JUMPING)
def test_the_ends_of_a_schedule_that_jumps_are_those_it_names(kind: str, exponent: float) -> None:
    schedule, rate = make_schedule(kind), of(kind, exponent).rate
    np.testing.assert_allclose(rate[[0, -1]], [schedule.start, schedule.end], rtol=1e-5)
    np.testing.assert_allclose(rate[[0, -1]], exact_mask_rate(kind, exponent, np.array([0.0, 1.0])), rtol=1e-5)
    assert schedule.end < 1 - 5e-5


@every_schedule
def test_alpha_follows_its_formula_and_never_rises(kind: str, exponent: float) -> None:
    values, exact = of(kind, exponent), exact_mask_rate(kind, exponent, TIMES.astype(np.float64))
    np.testing.assert_allclose(values.alpha, 1 - exact, atol=4e-7)
    np.testing.assert_allclose(
        values.rate[LATER], exact[LATER], rtol=3e-6
    )  # near time 0 as well, for weights divide by it
    assert np.diff(values.alpha).max() <= 2**-23  # one rounding step, which float32 powers may take
    assert np.diff(values.alpha[INNER][::5]).max() < 0


@every_schedule
def test_dalpha_is_the_derivative_of_alpha_and_never_positive(kind: str, exponent: float) -> None:
    values = of(kind, exponent)
    np.testing.assert_allclose(values.dalpha[INNER], values.derivative[INNER], rtol=2e-5, atol=1e-6)
    t, h = TIMES[INNER].astype(np.float64), 1e-6
    difference = exact_mask_rate(kind, exponent, t - h) - exact_mask_rate(kind, exponent, t + h)
    np.testing.assert_allclose(values.dalpha[INNER], difference / (2 * h), rtol=1e-5)
    assert values.dalpha[LATER].max() <= 0


@every_schedule
def test_weight_is_minus_dalpha_over_one_minus_alpha_and_finite_at_all_times_that_are_drawn(
    kind: str, exponent: float
) -> None:
    values = of(kind, exponent)
    np.testing.assert_allclose(values.weight[LATER], (-values.dalpha / values.rate.clip(1e-30))[LATER], rtol=2e-6)
    assert np.isfinite(values.weight[LATER]).all() and values.weight[LATER].min() >= 0


def test_weight_stays_a_number_where_a_steep_mask_rate_underflows() -> None:
    weight = of("poly", 20.0).weight[LATER]
    assert np.isfinite(weight).all()
    assert weight[-1] == pytest.approx(20.0, rel=1e-5)


@every_schedule
def test_time_of_and_the_mask_rate_are_inverses(kind: str, exponent: float) -> None:
    values, schedule = of(kind, exponent), make_schedule(kind, exponent=exponent)
    np.testing.assert_allclose(values.rate_at_time, TIMES.clip(schedule.start, schedule.end), atol=2e-6)
    inner = (TIMES > 0.1) & (TIMES < 0.95)
    np.testing.assert_allclose(values.time[inner], TIMES[inner], atol=2e-5)
    assert values.time.min() >= 0 and values.time.max() <= 1
    assert values.time[-1] == pytest.approx(1, abs=1e-7)


def test_the_exponent_changes_poly_alone_of_which_linear_and_sqrt_are_special_cases() -> None:
    assert (of("linear", 5.0).alpha == of("linear").alpha).all()
    assert (of("poly", 5.0).alpha != of("poly").alpha).any()
    for kind, exponent in (("linear", 1.0), ("sqrt", 0.5)):
        np.testing.assert_array_equal(of(kind).weight, of("poly", exponent).weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "cubic"}, "unknown schedule 'cubic': choose one of linear, cosine, sqrt, poly"),
        ({"kind": "loglinear", "eps": 0.5}, r"eps of a schedule must lie between 0 and 0\.5"),
        ({"kind": "loglinear", "eps": 0.0}, r"eps of a schedule must lie between 0 and 0\.5"),
        ({"kind": "poly", "exponent": 0.0}, "exponent of a poly schedule must be positive, not 0.0"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule(**options)
