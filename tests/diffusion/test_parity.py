"""The estimators against the published formulae, each written out again in float64 NumPy from its paper alone.

Both sides score the same noised rows and the same logits; nothing on the papers' side calls the package.
"""

from collections.abc import Callable
from functools import cache
from itertools import permutations, product
from math import comb, factorial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanodlm.diffusion.corruption import Corruption
from nanodlm.diffusion.noise import unmask_probability
from nanodlm.diffusion.objective import Objective
from nanodlm.diffusion.schedules import Schedule, make_schedule

MASK_ID, VOCAB = 6, 9  # the ids 7 and 8 are padding
ROWS, LENGTH = 1024, 12  # the same nearly everywhere, since every shape is compiled anew
TOLERANCE = 2e-5  # of float32 against float64

Real = np.ndarray | float
Alpha = Callable[[Any], Any]


class Example(NamedTuple):
    x_0: np.ndarray
    logits: np.ndarray


@cache
def example(seed: int, rows: int = ROWS, length: int = LENGTH) -> Example:
    """Random rows, a third of them ending in padding, and random logits that favour mask and padding."""
    rng = np.random.default_rng(seed)
    x_0 = rng.integers(0, MASK_ID, (rows, length))
    n_real = np.where(rng.random(rows) < 1 / 3, rng.integers(1, length + 1, rows), length)
    x_0 = np.where(np.arange(length) < n_real[:, None], x_0, rng.integers(MASK_ID + 1, VOCAB, (rows, length)))
    logits = 2 * rng.normal(size=(rows, length, VOCAB))
    logits[..., MASK_ID:] += 5
    return Example(x_0.astype(np.int32), logits.astype(np.float32))


class Scored(NamedTuple):
    """What the package noised, and the bound it gave, in float64."""

    x_t: np.ndarray
    t: np.ndarray
    bound: np.ndarray


def scored(of: Example, schedule: Schedule, **options: Any) -> Scored:
    objective, x_0 = Objective(schedule, MASK_ID, **options), jnp.asarray(of.x_0)
    noised = objective.corrupt(x_0, jax.random.key(0))
    bound = objective.row_nats(jnp.asarray(of.logits), x_0, noised).bound
    return Scored(np.asarray(noised.x_t), *(np.asarray(v, np.float64) for v in (noised.t, bound)))


# The papers' side: denoising distributions and schedules.


def predicted(logits: np.ndarray) -> np.ndarray:
    """x_theta over the real tokens, (..., MASK_ID): the logits of the mask and of padding are minus infinity."""
    weights = np.exp(logits[..., :MASK_ID].astype(np.float64))
    return weights / weights.sum(axis=-1, keepdims=True)


def surprise(of: Example) -> np.ndarray:
    """-log <x_theta, x> at each position, 0 at padding."""
    real = of.x_0 < MASK_ID
    at_token = np.take_along_axis(predicted(of.logits), np.where(real, of.x_0, 0)[..., None], axis=-1)[..., 0]
    return np.where(real, -np.log(at_token), 0.0)


def masked_surprise(of: Example, x_t: np.ndarray) -> np.ndarray:
    """The sum over masked positions of each row."""
    return (surprise(of) * (x_t == MASK_ID)).sum(axis=1)


def check(bound: np.ndarray, weight: np.ndarray, nats: np.ndarray, weight_error: float = 0.0) -> None:
    """The bound is weight times nats, but for the rounding of cross-entropies near 0 and, if given, of the weight."""
    error = np.abs(bound - weight * nats)
    allowed = TOLERANCE * weight * nats + 1e-6 * weight + weight_error * nats
    assert (error <= allowed).all(), f"off by {(error / np.maximum(allowed, 1e-30)).max():.3g} times what is allowed"


def clipped(alpha: Alpha, dalpha: Alpha, eps: float) -> tuple[Alpha, Alpha]:
    return (
        lambda t: np.clip(alpha(t), eps, 1 - eps),
        lambda t: np.where((alpha(t) > eps) & (alpha(t) < 1 - eps), dalpha(t), 0.0),
    )


def published(kind: str, eps: float = 1e-4, exponent: float = 2.0) -> tuple[Alpha, Alpha]:
    """alpha and its derivative inside (0, 1), by the formulae in the docstring of make_schedule."""
    half = np.pi / 2

    def phi(t: Real) -> Real:
        return half * (t + 0.008) / 1.008

    if kind == "linear":
        return lambda t: 1 - t, lambda t: 0 * t - 1
    if kind == "cosine":
        return lambda t: 1 - np.cos(half * (1 - t)), lambda t: -half * np.sin(half * (1 - t))
    if kind == "sqrt":
        return lambda t: 1 - np.sqrt(t), lambda t: -0.5 / np.sqrt(t)
    if kind == "poly":
        return lambda t: 1 - t**exponent, lambda t: -exponent * t ** (exponent - 1)
    if kind in ("loglinear", "linear_clipped"):
        return lambda t: 1 - (1 - eps) * t, lambda t: 0 * t - (1 - eps)
    if kind == "cosine_clipped":
        scale = np.cos(phi(0)) ** 2
        return clipped(lambda t: np.cos(phi(t)) ** 2 / scale, lambda t: -half / 1.008 * np.sin(2 * phi(t)) / scale, eps)
    assert kind == "sqrt_clipped"
    return clipped(lambda t: 1 - np.sqrt(t + eps), lambda t: -0.5 / np.sqrt(t + eps), eps)


def with_jumps(alpha: Alpha) -> Alpha:
    """Nothing is masked at t = 0 and all is at t = 1, whatever alpha is just inside."""
    return lambda t: np.where(t <= 0, 1.0, np.where(t >= 1, 0.0, alpha(t)))


JUMPING = [("loglinear", 0.1), ("linear_clipped", 1e-4), ("cosine_clipped", 0.1), ("sqrt_clipped", 1e-4)]


# Masking.


def test_log_linear_noise_weighs_rows_as_mdlm_does() -> None:
    """MDLM, arXiv:2406.07524, equation 10: weight sigma'(t) / expm1(sigma(t)), sigma(t) = -log(1 - (1 - eps) t).

    The paper's t is uniform; here it is drawn with probability 1 - eps, and an all-masked row otherwise: the step
    from move chance 1 - exp(-sigma(1)) = 1 - eps to the prior, where everything is masked.
    """
    of, eps = example(1), 0.1
    got = scored(of, make_schedule("loglinear", eps=eps))
    sigma, dsigma = -np.log1p(-(1 - eps) * got.t), (1 - eps) / (1 - (1 - eps) * got.t)
    last = got.t == 1
    assert abs(last.sum() - ROWS * eps) < 1.001
    share = np.where(last, eps, 1 - eps)
    check(got.bound, np.where(last, eps, dsigma / np.expm1(sigma)) / share, masked_surprise(of, got.x_t))
    real = of.x_0 < MASK_ID
    assert (got.x_t[last][real[last]] == MASK_ID).all()
    assert (got.x_t[~real] == of.x_0[~real]).all()


def test_subs_gives_unmasked_positions_and_the_mask_itself_no_part() -> None:
    """MDLM, arXiv:2406.07524, section 3.2.3: zero masking probabilities, and carry-over unmasking."""
    of = example(2)
    got = scored(of, make_schedule("linear"))
    logits = of.logits.astype(np.float64).copy()
    logits[..., MASK_ID:] = -np.inf
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    unmasked = got.x_t != MASK_ID
    log_p[unmasked] = np.where(np.arange(VOCAB) == got.x_t[unmasked][:, None], 0.0, -np.inf)
    nats = -np.take_along_axis(log_p, of.x_0[..., None], axis=-1)[..., 0].sum(axis=1)
    check(got.bound, 1 / got.t, nats)


@pytest.mark.parametrize("kind", ["linear", "cosine", "poly", "sqrt"])
def test_continuous_weights_are_those_of_md4(kind: str) -> None:
    """MD4, arXiv:2406.04329, equation 4: the integrand alpha'_t / (1 - alpha_t) sum over masked of log <mu, x_0>."""
    of = example(3)
    got = scored(of, make_schedule(kind, exponent=3.0))
    alpha, dalpha = published(kind, exponent=3.0)
    check(got.bound, -dalpha(got.t) / (1 - alpha(got.t)), masked_surprise(of, got.x_t))


@pytest.mark.parametrize(("kind", "eps"), JUMPING)
def test_jumps_at_the_ends_add_their_step_of_the_bound(kind: str, eps: float) -> None:
    """MD4, arXiv:2406.04329: equation 4 inside, and at either end equation 6's step over the jump."""
    of = example(4)
    got = scored(of, make_schedule(kind, eps=eps))
    alpha, dalpha = published(kind, eps)
    a, b = 1 - alpha(1e-15), 1 - alpha(1 - 1e-15)
    first, last = got.t == 0, got.t == 1
    share = np.where(first, a, np.where(last, 1 - b, b - a))
    # (alpha_s - alpha_t) / (1 - alpha_t) is 1 at the first jump (alpha_s = 1) and 1 - b at the last (alpha_t = 0).
    with np.errstate(divide="ignore", invalid="ignore"):
        inner = -dalpha(got.t) / (1 - alpha(got.t))
    weight = np.where(first, 1.0, np.where(last, 1 - b, inner))
    check(got.bound, weight / np.maximum(share, 1e-9), masked_surprise(of, got.x_t))
    assert abs(first.sum() - ROWS * a) < 1.001 and abs(last.sum() - ROWS * (1 - b)) < 1.001


@pytest.mark.parametrize(
    ("kind", "eps", "num_timesteps"),
    [("linear", 1e-4, 1), ("cosine", 1e-4, 16), ("poly", 1e-4, 16), ("loglinear", 0.1, 1), ("sqrt_clipped", 0.1, 16)],
)
def test_discrete_weights_are_those_of_md4(kind: str, eps: float, num_timesteps: int) -> None:
    """MD4, arXiv:2406.04329, equation 6, with the reconstruction term of its first step: alpha(0) = 1, s = t - 1/T."""
    of = example(5)
    got = scored(of, make_schedule(kind, eps=eps), estimator="discrete", num_timesteps=num_timesteps)
    alpha = with_jumps(published(kind, eps)[0])
    t = np.round(got.t * num_timesteps) / num_timesteps
    s = t - 1 / num_timesteps
    weight = num_timesteps * (alpha(np.where(s < 1e-9, 0.0, s)) - alpha(t)) / (1 - alpha(t))
    # The package takes 1 - m_s / m_t, where alpha hardly changes a difference of numbers near 1.
    check(got.bound, weight, masked_surprise(of, got.x_t), weight_error=4e-7 * num_timesteps)
    assert len(np.unique(t)) == num_timesteps and got.bound.max() > 0


@pytest.mark.parametrize("estimator", ["count", "constant_count"])
def test_counts_give_lladas_monte_carlo_estimate(estimator: str) -> None:
    """LLaDA, arXiv:2502.09992, equation 6: l uniform on 1..L, L / l times the sum over the l masked; L less padding."""
    of = example(6)
    got = scored(of, make_schedule("linear"), estimator=estimator)
    length, count = (of.x_0 < MASK_ID).sum(axis=1), (got.x_t == MASK_ID).sum(axis=1)
    assert ((count >= 1) & (count <= length)).all()
    check(got.bound, length / count, masked_surprise(of, got.x_t))


# A denoiser that is any table over the patterns of masks, so that expectations are sums over all of them. By the tests
# above, the package's bound of a row is its weight times its nats, so that the mean over patterns is taken here.

SHORT = 4
PATTERNS = np.array(list(product([False, True], repeat=SHORT)))
MASKED = PATTERNS.sum(axis=1)  # how many each pattern masks
WAYS = np.array([comb(SHORT, n) for n in MASKED])
TABLE = Example(
    np.tile(np.int32([2, 0, 5, 2] + [MASK_ID + 1] * (LENGTH - SHORT)), (len(PATTERNS), 1)),
    2 * np.random.default_rng(7).normal(size=(len(PATTERNS), LENGTH, VOCAB)).astype(np.float32),
)
TABLE_NATS = surprise(TABLE)[:, :SHORT]  # of every position under every pattern
PATTERN_NATS = (TABLE_NATS * PATTERNS).sum(axis=1)


def lambda_dce() -> float:
    """RADD's loss of the table: 1/lambda integrates to Beta(n, L - n + 1) for each pattern of n masks."""
    n = np.maximum(MASKED, 1)
    beta = np.array([factorial(k - 1) * factorial(SHORT - k) / factorial(SHORT) for k in n])
    return float((np.where(MASKED > 0, beta, 0.0) * PATTERN_NATS).sum())


def pattern_chances(mask_rate: np.ndarray) -> np.ndarray:
    """Probability of each pattern when each position is masked by itself: (N, 16)."""
    m = np.asarray(mask_rate, np.float64)[:, None]
    return m**MASKED * (1 - m) ** (SHORT - MASKED)


def drawn(objective: Objective, seed: int = 0) -> Corruption:
    """The package's noise for copies of the table's row; its times or counts cover their range evenly."""
    return objective.corrupt(jnp.tile(jnp.asarray(TABLE.x_0[:1]), (ROWS, 1)), jax.random.key(seed))


def test_lambda_dce_is_the_any_order_autoregressive_loss() -> None:
    """RADD, arXiv:2406.03736, section 4: the mean over all orders of the tokens; the reference checks itself."""
    power = 2 ** np.arange(SHORT)[::-1]
    orders = [
        sum(TABLE_NATS[power[list(order[i:])].sum(), order[i]] for i in range(SHORT))
        for order in permutations(range(SHORT))
    ]
    assert lambda_dce() == pytest.approx(np.mean(orders), rel=1e-12)


@pytest.mark.parametrize("estimator", ["count", "constant_count"])
def test_the_count_forms_expectation_is_lambda_dce(estimator: str) -> None:
    """RADD, arXiv:2406.03736, lambda-DCE: counts are 1 to L equally often, each with C(L, n) patterns."""
    objective = Objective(make_schedule("linear"), MASK_ID, estimator=estimator)
    noised = drawn(objective)
    count = (np.asarray(noised.x_t) == MASK_ID).sum(axis=1)
    assert (np.bincount(count)[1:] == ROWS / SHORT).all()
    chances = (count[:, None] == MASKED) / WAYS
    mean = (np.asarray(noised.weight, np.float64) * (chances @ PATTERN_NATS)).mean()
    assert mean == pytest.approx(lambda_dce(), rel=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "sqrt"])
def test_the_continuous_forms_expectation_is_lambda_dce(kind: str) -> None:
    """RADD, arXiv:2406.03736: the integral over lambda = 1 - alpha_t does not depend on the schedule."""
    nodes, weights = np.polynomial.legendre.leggauss(64)
    u = (nodes + 1) / 2
    t, step = u**2, weights * u  # t = u^2 takes away the edge of sqrt
    schedule = make_schedule(kind)
    chances = pattern_chances(1 - published(kind)[0](t))
    weight = np.asarray(schedule.weight(jnp.float32(t)), np.float64)
    integral = (step * weight * (chances @ PATTERN_NATS)).sum()
    assert integral == pytest.approx(lambda_dce(), rel=2e-6)


@pytest.mark.parametrize(("kind", "eps"), JUMPING)
def test_jumps_add_a_discrete_step_each_to_the_integral_between_them(kind: str, eps: float) -> None:
    """RADD, arXiv:2406.03736, lambda-DCE over lambda in (a, b); MD4, arXiv:2406.04329, equation 6, over the jumps."""
    batches = [drawn(Objective(make_schedule(kind, eps=eps), MASK_ID), seed) for seed in range(16)]
    t, weight = (np.concatenate(v).astype(np.float64) for v in ([b.t for b in batches], [b.weight for b in batches]))
    alpha = published(kind, eps)[0]
    rate = np.where(t == 1, 1.0, 1 - alpha(np.maximum(t, 1e-15)))
    of_row = weight * (pattern_chances(rate) @ PATTERN_NATS)

    a, b = 1 - alpha(1e-15), 1 - alpha(1 - 1e-15)
    nodes, weights = np.polynomial.legendre.leggauss(SHORT)  # exact for polynomials
    rates = a + (b - a) * (nodes + 1) / 2
    between = (b - a) / 2 * (weights / rates * (pattern_chances(rates) @ PATTERN_NATS)).sum()
    over_jumps = pattern_chances(np.array([a])) @ PATTERN_NATS + (1 - b) * PATTERN_NATS[-1]
    expected = float(between + over_jumps[0])
    # Evenly spread times are a rectangle rule, whose error here has 16 random offsets to average out.
    means = of_row.reshape(len(batches), ROWS).mean(axis=1)
    error = means.std(ddof=1) / np.sqrt(len(batches))
    assert abs(means.mean() - expected) < 4 * error + 1e-5 * expected
    assert error < (3e-4 if eps > 0.01 else 3e-3) * expected
    assert eps > 0.01 or expected == pytest.approx(lambda_dce(), rel=1e-3)


@pytest.mark.parametrize("kind", ["linear", "cosine_clipped"])
def test_the_discrete_forms_expectation_is_md4s_sum_and_falls_to_lambda_dce(kind: str) -> None:
    """MD4, arXiv:2406.04329, equation 6, over all patterns; its limit is RADD's loss, arXiv:2406.03736."""
    alpha, gaps = with_jumps(published(kind)[0]), []
    for num_timesteps in (4, 256):
        objective = Objective(make_schedule(kind), MASK_ID, estimator="discrete", num_timesteps=num_timesteps)
        noised = drawn(objective)
        t = np.round(np.asarray(noised.t, np.float64) * num_timesteps) / num_timesteps
        assert (np.unique(t, return_counts=True)[1] == ROWS / num_timesteps).all()
        nats = pattern_chances(1 - alpha(t)) @ PATTERN_NATS
        mean = (np.asarray(noised.weight, np.float64) * nats).mean()
        step = (alpha(t - 1 / num_timesteps) - alpha(t)) / (1 - alpha(t))
        expected = (step * nats).mean() * num_timesteps
        assert mean == pytest.approx(expected, rel=TOLERANCE)
        gaps.append(abs(mean - lambda_dce()) / lambda_dce())
    assert gaps[1] < 0.02 < gaps[0]


@pytest.mark.parametrize(
    ("estimator", "kind", "eps"),
    [
        ("continuous", "cosine", None),
        ("continuous", "sqrt_clipped", 0.2),
        ("discrete", "cosine", None),
        ("count", "linear", None),
    ],
)
def test_patterns_are_drawn_as_often_as_the_enumeration_weighs_them(
    estimator: str, kind: str, eps: float | None
) -> None:
    """D3PM, arXiv:2107.03006, section 3.1, of q(x_t | x_0); LLaDA, arXiv:2502.09992, equation 6, of l of L tokens."""
    steps, batches = 4, 16
    objective = Objective(make_schedule(kind, eps=eps), MASK_ID, estimator=estimator, num_timesteps=steps)
    x_t = np.concatenate([drawn(objective, seed).x_t for seed in range(batches)])
    masked = x_t[:, :SHORT] == MASK_ID
    frequency = np.bincount(masked @ 2 ** np.arange(SHORT)[::-1], minlength=len(PATTERNS)) / len(x_t)
    alpha = published(kind, eps or 1e-4)[0]
    a, b = 1 - alpha(1e-15), 1 - alpha(1 - 1e-15)
    middle = (np.arange(4096) + 0.5) / 4096
    chance = {
        "continuous": (b - a) * pattern_chances(1 - alpha(middle)).mean(axis=0)
        + a * pattern_chances(np.array([a]))[0]
        + (1 - b) * (MASKED == SHORT),
        "discrete": pattern_chances(1 - alpha(np.arange(1, steps + 1) / steps)).mean(axis=0),
    }.get(estimator, (MASKED > 0) / (SHORT * WAYS))
    assert chance.sum() == pytest.approx(1)
    assert (np.abs(frequency - chance) <= 4 * np.sqrt(chance / len(x_t)) + 1e-6).all()


# Noise of random tokens.


def inside(of: Example, got: Scored) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clean tokens and noised ones, both 0 at padding, and which count."""
    real = of.x_0 < MASK_ID
    return np.where(real, of.x_0, 0), np.where(real, got.x_t, 0), real


def one_hot(x: np.ndarray, size: int) -> np.ndarray:
    return (np.arange(size) == x[..., None]).astype(np.float64)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_uniform_noise_gives_udlms_continuous_bound(kind: str) -> None:
    """UDLM, arXiv:2412.10193, continuous-time NELBO (equation 14), i being the index of z_t:

    alpha'_t / (N alpha_t) [N / xbar_i - N / (xbar_theta)_i
                            - sum_j xbar_j / xbar_i log((xbar_theta)_i xbar_j / ((xbar_theta)_j xbar_i))]
    """
    of = example(8)
    got = scored(of, make_schedule(kind), kind="uniform")
    alpha, dalpha = (f(got.t)[:, None] for f in published(kind))
    n = MASK_ID
    x, z, real = inside(of, got)
    xbar = n * alpha[..., None] * one_hot(x, n) + (1 - alpha[..., None])
    xbar_theta = n * alpha[..., None] * predicted(of.logits) + (1 - alpha[..., None])
    i = z[..., None]
    assert z.max() < n
    xbar_i, xbar_theta_i = (np.take_along_axis(v, i, axis=-1) for v in (xbar, xbar_theta))
    summed = (xbar / xbar_i * np.log(xbar_theta_i * xbar / (xbar_theta * xbar_i))).sum(axis=-1)
    integrand = dalpha / (n * alpha) * ((n / xbar_i - n / xbar_theta_i)[..., 0] - summed)
    expected = np.where(real, integrand, 0.0).sum(axis=1)
    np.testing.assert_allclose(got.bound, expected, rtol=TOLERANCE, atol=1e-4)


class Mixing(NamedTuple):
    """GIDD's alpha_t and beta_t pi_t over MASK_ID + 1 states, the last being the mask, and their derivatives."""

    alpha: np.ndarray
    noise: np.ndarray
    dalpha: np.ndarray
    dnoise: np.ndarray


def gidd_mixing(t: np.ndarray, p_u: float) -> Mixing:
    t = t[:, None, None]
    b = 2 * p_u / (1 - p_u)
    c, dc = b * np.sqrt(t * (1 - t)), b * (1 - 2 * t) / (2 * np.sqrt(t * (1 - t)))
    mask, u = np.eye(MASK_ID + 1)[MASK_ID], np.append(np.full(MASK_ID, 1 / MASK_ID), 0.0)
    total = 1 + c
    return Mixing(
        (1 - t) / total,
        (t * mask + c * u) / total,
        -1 / total - (1 - t) * dc / total**2,
        (mask + dc * u) / total - (t * mask + c * u) * dc / total**2,
    )


def gidd_bound(of: Example, got: Scored, p_u: float) -> np.ndarray:
    at = gidd_mixing(got.t, p_u)
    x, z, real = inside(of, got)
    x_theta = np.concatenate([predicted(of.logits), np.zeros((*x.shape, 1))], axis=-1)
    q, q_theta = (at.alpha * v + at.noise for v in (one_hot(x, MASK_ID + 1), x_theta))
    q_z, q_theta_z = (np.take_along_axis(v, z[..., None], axis=-1)[..., 0] for v in (q, q_theta))
    rate = at.dnoise - at.dalpha / at.alpha * at.noise
    weight = np.take_along_axis(np.broadcast_to(rate, q.shape), z[..., None], axis=-1)[..., 0] / q_z
    kl = (q * np.log(q / q_theta)).sum(axis=-1)
    ratio = q_z / q_theta_z
    return np.where(real, weight * (kl + ratio - np.log(ratio) - 1), 0.0).sum(axis=1)


def test_hybrid_noise_gives_gidds_bound() -> None:
    """GIDD, arXiv:2503.04482, sections 3 and 4: w_t(z, x) (KL(q(.|x) || q(.|x_theta)) + D_IS(q_z || q_z)).

    Its beta_t pi'_t - alpha'_t / alpha_t pi_t is (beta_t pi_t)' - alpha'_t / alpha_t beta_t pi_t, since
    beta_t = 1 - alpha_t.
    """
    of, p_u = example(9), 0.2
    got = scored(of, make_schedule("linear"), kind="hybrid", uniform_share=p_u)
    np.testing.assert_allclose(got.bound, gidd_bound(of, got, p_u), rtol=TOLERANCE, atol=1e-4)


def test_hybrid_noise_of_hardly_any_random_tokens_is_mdlms() -> None:
    """GIDD, arXiv:2503.04482, section 4: masking alone at p_u = 0; MDLM, arXiv:2406.07524, equation 10."""
    of = example(10)
    got = scored(of, make_schedule("linear"), kind="hybrid", uniform_share=1e-7)
    assert (got.x_t == MASK_ID).any(axis=1).mean() > 0.5
    mdlm = masked_surprise(of, got.x_t) / got.t
    np.testing.assert_allclose(got.bound, gidd_bound(of, got, 1e-7), rtol=TOLERANCE, atol=1e-4)
    assert got.bound.mean() == pytest.approx(mdlm.mean(), rel=1e-4)
    np.testing.assert_allclose(gidd_bound(of, got, 1e-12), mdlm, rtol=1e-7, atol=1e-6)


def marginal(kind: str, alpha: Alpha, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The share of x_0 left at time t, and the noise over MASK_ID + 1 states."""
    if kind == "hybrid":
        at = gidd_mixing(1 - alpha(t), 0.3)
        return at.alpha, at.noise
    kept = alpha(t)[:, None, None]
    states = np.arange(MASK_ID + 1)
    to = states == MASK_ID if kind == "absorbing" else (states < MASK_ID) / MASK_ID
    return kept, (1 - kept) * to


@pytest.mark.parametrize(("kind", "schedule"), [("absorbing", "cosine"), ("uniform", "linear"), ("hybrid", "cosine")])
def test_the_bounds_density_is_the_divergence_of_d3pm_posteriors_a_short_step_apart(kind: str, schedule: str) -> None:
    """D3PM, arXiv:2107.03006, equation 3: KL(q(x_s | x_t, x_0) || q(x_s | x_t, x_theta)) / (t - s) as s nears t.

    The posterior of x_s is q(x_t | x_s) q(x_s | .) / q(x_t | .): nothing of the continuous formulae enters.
    """
    of = example(11)
    got = scored(of, make_schedule(schedule), kind=kind, uniform_share=0.3)
    x, z, real = inside(of, got)
    alpha, step = published(schedule)[0], 1e-6
    here = (got.t > 0.05) & (got.t < 0.9)
    s = np.where(here, got.t - step, 0.5)
    t = s + step
    kept_t, noise_t = marginal(kind, alpha, t)
    kept_s, noise_s = marginal(kind, alpha, s)
    stay = kept_t / kept_s
    fresh = noise_t - stay * noise_s  # the noise that is added between s and t
    fresh_z = np.take_along_axis(np.broadcast_to(fresh, (*z.shape, MASK_ID + 1)), z[..., None], axis=-1)
    forward = stay * one_hot(z, MASK_ID + 1) + fresh_z  # q(x_t = z | x_s), for every x_s
    x_theta = np.concatenate([predicted(of.logits), np.zeros((*x.shape, 1))], axis=-1)
    posterior = []
    for clean in (one_hot(x, MASK_ID + 1), x_theta):
        joint = forward * (kept_s * clean + noise_s)
        posterior.append(joint / joint.sum(axis=-1, keepdims=True))
    q, p = posterior
    kl = np.where(q > 0, q * np.log(np.where(q > 0, q, 1.0) / np.where(q > 0, p, 1.0)), 0.0).sum(axis=-1)
    if kind == "absorbing":
        kl = np.where(z == MASK_ID, kl, 0.0)  # an unmasked token stays: the denoiser's x_theta there is x_0 (SUBS)
    expected = np.where(real, kl, 0.0).sum(axis=1) / step
    assert here.sum() > ROWS / 2
    np.testing.assert_allclose(got.bound[here], expected[here], rtol=1e-4, atol=1e-3)


# Blocks, and single steps.

BLOCKED = ROWS // 4  # rows that make up ROWS blocks


def test_blocks_weigh_their_own_masks_by_their_own_times() -> None:
    """BD3-LM, arXiv:2503.09573, equation 8, linear noise: the sum over blocks of 1/t_b times that over its masks."""
    of, size, rows = example(12, BLOCKED, 11), 3, BLOCKED
    got = scored(of, make_schedule("linear"), kind="block", block_size=size)
    assert got.t.shape == (rows, 4) and len(np.unique(got.t)) == got.t.size
    nats = surprise(of) * (got.x_t == MASK_ID)
    expected = sum(nats[:, b * size : (b + 1) * size].sum(axis=1) / got.t[:, b] for b in range(4))
    np.testing.assert_allclose(got.bound, expected, rtol=TOLERANCE)


@pytest.mark.parametrize(
    ("kind", "eps"), [("linear", None), ("cosine", None), ("poly", None), ("loglinear", 0.1), ("cosine_clipped", 0.1)]
)
def test_a_masked_token_is_revealed_as_d3pms_posterior_says(kind: str, eps: float | None) -> None:
    """D3PM, arXiv:2107.03006, equation 3: x_t Q_t^T * x_0 Qbar_s / (x_0 Qbar_t x_t^T), of absorbing matrices.

    It is (alpha_s - alpha_t) / (1 - alpha_t) in MDLM, arXiv:2406.07524, equation 7.
    """
    alpha, size = with_jumps(published(kind, eps or 1e-4)[0]), 4
    mask = size - 1
    s, t = np.array([(0, 0.3), (0.25, 0.5), (0.5, 0.75), (0.1, 0.9), (0.75, 1), (0, 1)]).T
    found = unmask_probability(make_schedule(kind, eps=eps), jnp.float32(t), jnp.float32(s))
    for got, alpha_s, alpha_t in zip(found.tolist(), alpha(s), alpha(t), strict=True):
        bar_s, bar_t = (a * np.eye(size) + (1 - a) * np.eye(size)[mask] for a in (alpha_s, alpha_t))
        step = np.linalg.solve(bar_s, bar_t)
        posterior = step[:, mask] * bar_s[0] / bar_t[0, mask]
        np.testing.assert_allclose(posterior, [got, 0, 0, 1 - got], rtol=TOLERANCE, atol=1e-6)
