"""The bound of a denoiser with exact conditionals is -log p(x_0) itself, so every estimator has a known mean."""

import inspect
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nanodlm.diffusion.corruption import Corruption, shift_right
from nanodlm.diffusion.cross_entropy import cross_entropy
from nanodlm.diffusion.kinds import Estimator, KindName, Times, Weighting
from nanodlm.diffusion.mixed import mixed_divergence, shares
from nanodlm.diffusion.nelbo import nelbo
from nanodlm.diffusion.noise import Denoise, q_sample, unmask_probability
from nanodlm.diffusion.objective import Objective, RowNats
from nanodlm.diffusion.plain import plain_nelbo
from nanodlm.diffusion.schedules import make_schedule
from nanodlm.model.transformer import segments
from tests.model.test_transformer import randomised
from tests.support.laws import (
    MASK_ID,
    TOKENS,
    VOCAB,
    entropy,
    exact_denoiser,
    exact_mixed_denoiser,
    markov_table,
    mean_residual,
    rough_table,
    sequences,
)

LENGTH = 8
TABLE = markov_table(LENGTH)
EXACT = exact_denoiser(TABLE)
KEYS = jax.random.split(jax.random.key(0), 64)
SLOW = partial(pytest.param, marks=pytest.mark.slow)


def wrong(x_t: jax.Array, t: jax.Array) -> jax.Array:
    """A denoiser that sees only the token before and gets it wrong."""
    table = jnp.asarray(np.random.default_rng(1).normal(size=(VOCAB, VOCAB)), jnp.float32)
    return table[jnp.roll(x_t, 1, axis=1)]


def uniform(x_t: jax.Array, t: jax.Array) -> jax.Array:
    return jnp.zeros((*x_t.shape, VOCAB))


SETTINGS = ("schedule", "mask_id", "estimator", "num_timesteps", "objective", "block_size", "uniform_share", "times")
fast_nelbo = jax.jit(nelbo, static_argnames=("denoise", *SETTINGS))


@partial(jax.jit, static_argnames=("objective",))
def noise(objective: Objective, x_0: jax.Array, key: jax.Array) -> Corruption:
    return objective.corrupt(x_0, key)


@partial(jax.jit, static_argnames=("objective",))
def score(objective: Objective, logits: jax.Array, x_0: jax.Array, noised: Corruption) -> RowNats:
    return objective.row_nats(logits, x_0, noised)


@partial(jax.jit, static_argnames=("objective", "denoise"))
def excess(objective: Objective, denoise: Denoise, table: np.ndarray, keys: jax.Array) -> jax.Array:
    """Bounds less -log p(x_0), for 512 rows that are drawn from a law with each key, (keys, 512)."""
    every, p = jnp.asarray(sequences(table.ndim)), jnp.asarray(table.reshape(-1), jnp.float32)

    def batch(key: jax.Array) -> jax.Array:
        data_key, noise_key = jax.random.split(key)
        # The inverse of the distribution function is much less work than Gumbel noise on 6,561 classes.
        which = jnp.searchsorted(jnp.cumsum(p), jax.random.uniform(data_key, (512,)))
        noised = objective.corrupt(every[which], noise_key)
        logits = objective.logits(denoise, every[which], noised)
        return objective.row_nats(logits, every[which], noised).bound + jnp.log(p[which])

    return jax.vmap(batch)(keys)


def mean_and_error(values: jax.Array) -> tuple[float, float]:
    """Mean, and its standard error from the batches' means, since the rows of a batch share their times."""
    means = np.asarray(values, np.float64).mean(axis=1)
    return float(means.mean()), float(means.std(ddof=1) / np.sqrt(len(means)))


def discrete_excess(objective: Objective) -> float:
    """What steps add to the entropy, summed over the steps and over how many positions are masked."""
    t = jnp.arange(1, objective.num_timesteps + 1) / objective.num_timesteps
    probability = unmask_probability(objective.schedule, t, t - 1 / objective.num_timesteps)
    rate = np.where(t == 1, 1, objective.schedule.mask_rate(t))
    return float((np.asarray(probability, np.float64) * mean_residual(TABLE, rate)).sum()) - entropy(TABLE)


def test_the_bound_of_exact_conditionals_is_the_entropy_and_counts_vary_least() -> None:
    spread = {}
    for estimator in ("count", "constant_count", "continuous"):
        values = excess(Objective(make_schedule("linear"), MASK_ID, estimator=estimator), EXACT, TABLE, KEYS)
        mean, error = mean_and_error(values)
        assert abs(mean) < 4 * error
        assert estimator == "continuous" or error < 0.02
        spread[estimator] = values.var(), values.mean(axis=1).var()
    assert 3 * spread["count"][0] < spread["continuous"][0]
    assert 2 * spread["count"][1] < spread["continuous"][1]


@pytest.mark.parametrize(("kind", "num_timesteps"), [("cosine", 4), ("sqrt_clipped", 2)])
def test_the_discrete_estimator_exceeds_the_entropy_by_what_enumeration_gives(kind: str, num_timesteps: int) -> None:
    objective = Objective(make_schedule(kind), MASK_ID, estimator="discrete", num_timesteps=num_timesteps)
    mean, error = mean_and_error(excess(objective, EXACT, TABLE, KEYS))
    assert abs(mean - discrete_excess(objective)) < 4 * error
    assert mean > 4 * error


def test_counts_tell_the_network_the_time_at_which_that_share_is_masked() -> None:
    schedule = make_schedule("cosine")
    noised, of_linear = (
        noise(Objective(s, MASK_ID, estimator="count"), jnp.zeros((32, 10), jnp.int32), jax.random.key(0))
        for s in (schedule, make_schedule("linear"))
    )
    np.testing.assert_array_equal(noised.x_t, of_linear.x_t)  # and nothing else depends on the schedule
    share = (noised.x_t == MASK_ID).mean(axis=1)
    np.testing.assert_allclose(schedule.mask_rate(noised.t), share, rtol=1e-5)
    np.testing.assert_allclose(noised.weight, 1 / share, rtol=1e-6)


@pytest.mark.parametrize(("estimator", "kind"), [("continuous", "sqrt"), ("discrete", "steep"), ("count", "steep")])
def test_the_loss_and_its_gradient_are_finite_when_almost_nothing_is_masked(estimator: Estimator, kind: str) -> None:
    schedule = make_schedule("poly", exponent=20.0) if kind == "steep" else make_schedule(kind)
    options = {"schedule": schedule, "mask_id": MASK_ID, "estimator": estimator, "num_timesteps": 2**14}
    x_0 = jnp.zeros((2048, 2), jnp.int32)

    @jax.jit
    def mean(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        same = lambda x_t, t: jnp.broadcast_to(logits, (*x_t.shape, VOCAB))  # noqa: E731
        nats = nelbo(same, x_0, jax.random.key(0), **options)
        return nats.mean(), nats.min()

    (value, least), gradient = jax.value_and_grad(mean, has_aux=True)(jnp.zeros(VOCAB))
    assert float(value) > 0 and bool(jnp.isfinite(value))
    assert bool(jnp.isfinite(gradient).all())
    assert estimator == "count" or float(least) == 0  # a row without any mask was among them


@pytest.mark.parametrize(
    ("denoiser", "kind", "share"), [("exact", "uniform", 1.0), ("exact", "hybrid", 0.1), ("wrong", "hybrid", 0.5)]
)
def test_mixed_noise_has_a_bound_that_is_tight_for_exact_conditionals(kind: str, share: float, denoiser: str) -> None:
    """By enumeration of all x_0 and x_t of three tokens, and quadrature over the mask rate."""
    length, schedule = 3, make_schedule("linear")
    table = rough_table(length)
    states = np.stack(np.unravel_index(np.arange((TOKENS + 1) ** length), (TOKENS + 1,) * length), axis=1)
    x_0 = jnp.asarray(np.repeat(sequences(length), len(states), axis=0))
    x_t = jnp.asarray(np.tile(states, (TOKENS**length, 1)), jnp.int32)
    p = jnp.asarray(np.repeat(table.reshape(-1), len(states)), jnp.float32)
    denoise = exact_mixed_denoiser(table, schedule, share) if denoiser == "exact" else wrong

    @jax.jit
    def integrand(m: jax.Array) -> jax.Array:
        rate = jnp.full(len(x_0), m)
        weight, nats = mixed_divergence(denoise(x_t, rate), x_0, x_t, rate, mask_id=MASK_ID, uniform_share=share)
        kept, masked, uniform = shares(m, share)
        q = jnp.where(x_t == MASK_ID, masked, kept * (x_t == x_0) + uniform / TOKENS).prod(axis=1)
        return jnp.where(q > 0, p * q * weight * nats.sum(axis=1), 0).sum()

    nodes, weights = np.polynomial.legendre.leggauss(40)
    v = (nodes + 1) / 2
    m, dm = v**6 * (2 - v**6), 12 * v**5 * (1 - v**6)  # flat at both ends, where the integrand is steep
    bound = sum(w / 2 * d * float(integrand(jnp.float32(at))) for w, d, at in zip(weights, dm, m, strict=True))
    if denoiser == "exact":
        assert bound == pytest.approx(entropy(table), abs=2e-4)
    else:
        assert bound > entropy(table) + 0.3


@pytest.mark.parametrize(
    ("estimator", "schedule", "kind", "share"),
    [
        ("count", "linear", "hybrid", 0.1),
        SLOW("count", "cosine", "uniform", 1.0),
        SLOW("continuous", "poly", "hybrid", 0.5),
    ],
)
def test_mixed_estimates_have_the_entropy_as_their_mean(
    kind: KindName, share: float, estimator: Estimator, schedule: str
) -> None:
    table, noise_schedule = markov_table(3), make_schedule(schedule, exponent=4.0)
    objective = Objective(noise_schedule, MASK_ID, kind=kind, estimator=estimator, uniform_share=share)
    denoise = exact_mixed_denoiser(table, noise_schedule, share)
    mean, error = mean_and_error(excess(objective, denoise, table, jax.random.split(jax.random.key(0), 100)))
    assert abs(mean) < 4 * error
    assert error < (0.025 if estimator == "count" else 0.05)


def earlier_blocks(denoise: Denoise, size: int) -> Denoise:
    """Predicts each block from the clean blocks before it and its own noised tokens; what follows is masked."""

    def blockwise(x_t: jax.Array, t: jax.Array, context: jax.Array) -> jax.Array:
        block = jnp.arange(x_t.shape[1]) // size
        logits = jnp.zeros((*x_t.shape, VOCAB))
        for k in range(-(-x_t.shape[1] // size)):
            row = jnp.where(block < k, context, jnp.where(block == k, x_t, MASK_ID))
            logits = jnp.where((block == k)[:, None], denoise(row, t[:, k]), logits)
        return logits

    return blockwise


def next_token(denoise: Denoise) -> Denoise:
    """Predicts each token from those before it, given x_0 shifted right behind the begin token."""

    def autoregressive(x_in: jax.Array, t: jax.Array) -> jax.Array:
        position, length = jnp.arange(x_in.shape[1]), x_in.shape[1]
        rows = [jnp.where(position < i, jnp.roll(x_in, -1, axis=1), MASK_ID) for i in range(length)]
        return jnp.stack([denoise(row, t)[:, i] for i, row in enumerate(rows)], axis=1)

    return autoregressive


@pytest.mark.parametrize(("estimator", "size"), [("count", 2), ("constant_count", 1), ("constant_count", 3)])
def test_blocks_of_any_size_have_the_entropy_as_their_bound(size: int, estimator: Estimator) -> None:
    table = rough_table(5)
    objective = Objective(make_schedule("linear"), MASK_ID, kind="block", estimator=estimator, block_size=size)
    above = excess(objective, earlier_blocks(exact_denoiser(table), size), table, KEYS)
    mean, error = mean_and_error(above)
    assert abs(mean) < max(4 * error, 1e-5)
    assert error < 0.02
    if size == 1:  # nothing is left to chance
        np.testing.assert_allclose(above, 0, atol=2e-5)


def test_block_size_one_is_the_autoregressive_likelihood_and_block_size_l_the_absorbing_bound() -> None:
    """BD3-LM, arXiv:2503.09573, section 3.4."""
    x_0 = jax.random.randint(jax.random.key(1), (32, 6), 0, TOKENS)
    options = {"schedule": make_schedule("cosine"), "mask_id": MASK_ID, "estimator": "count"}
    key = jax.random.key(2)
    one = fast_nelbo(earlier_blocks(wrong, 1), x_0, key, objective="block", block_size=1, **options)
    ar = fast_nelbo(next_token(wrong), x_0, key, objective="autoregressive", **options)
    np.testing.assert_allclose(one, ar, rtol=1e-5)
    whole = fast_nelbo(earlier_blocks(wrong, 6), x_0, key, objective="block", block_size=6, **options)
    np.testing.assert_allclose(whole, fast_nelbo(wrong, x_0, key, **options), rtol=1e-5)


def test_the_autoregressive_number_is_minus_log_p_of_each_row() -> None:
    table = rough_table(4)
    rows = jnp.asarray(sequences(4))
    options = {"schedule": make_schedule("linear"), "mask_id": MASK_ID, "objective": "autoregressive"}
    nats = fast_nelbo(next_token(exact_denoiser(table)), rows, jax.random.key(0), **options)
    np.testing.assert_allclose(nats, -np.log(table.reshape(-1)), rtol=1e-4)


def test_the_first_token_of_each_document_is_predicted_from_the_begin_token() -> None:
    x_0, segment_ids = jnp.asarray([[5, 6, 7, 8]]), jnp.asarray([[0, 0, 1, 1]])
    np.testing.assert_array_equal(shift_right(x_0, segment_ids, begin_id=9), [[9, 5, 9, 7]])
    np.testing.assert_array_equal(shift_right(x_0, begin_id=9), [[9, 5, 6, 7]])


@pytest.mark.parametrize(("length", "times"), [(9, "systematic"), (8, "independent")])
def test_constant_counts_sum_to_the_same_in_every_pair_and_are_uniform_by_themselves(times: Times, length: int) -> None:
    objective = Objective(make_schedule("linear"), MASK_ID, estimator="constant_count", times=times)
    x_0 = jnp.zeros((5, length), jnp.int32)  # the last row has no neighbour
    draws = 6000
    counts = np.asarray(
        jax.jit(jax.vmap(lambda key: (objective.corrupt(x_0, key).x_t == MASK_ID).sum(axis=1)))(
            jax.random.split(jax.random.key(3), draws)
        )
    )
    np.testing.assert_array_equal(counts[:, :4].reshape(draws, 2, 2).sum(axis=2), length + 1)
    for row in counts.T:
        seen = np.bincount(row, minlength=length + 1)[1:]
        expected = draws / length
        assert ((seen - expected) ** 2 / expected).sum() < 26.2  # chi-square, 8 degrees of freedom, level 0.001


OBJECTIVES: list[dict[str, Any]] = [
    {"kind": "absorbing", "estimator": "constant_count"},
    {"kind": "block", "estimator": "count", "block_size": 3},
    {"kind": "autoregressive"},
    {"kind": "hybrid", "estimator": "count", "uniform_share": 0.3},
]
every_objective = pytest.mark.parametrize("options", OBJECTIVES, ids=lambda o: o["kind"])


@pytest.mark.parametrize("padding", [MASK_ID, MASK_ID + 1])
@pytest.mark.parametrize("options", [*OBJECTIVES, {"kind": "uniform"}], ids=lambda o: o["kind"])
def test_padding_is_never_noised_nor_scored(options: dict[str, Any], padding: int) -> None:
    x_0 = jax.random.randint(jax.random.key(1), (8, 7), 0, TOKENS)
    filled = jnp.concatenate([x_0, jnp.full((8, 4), padding)], axis=1).at[5].set(padding)
    objective = Objective(make_schedule("cosine"), MASK_ID, **options)

    noised = noise(objective, filled, jax.random.key(0))
    if objective.kind != "autoregressive":
        np.testing.assert_array_equal(noised.x_t[filled == padding], padding)
    logits = jax.random.normal(jax.random.key(2), (*filled.shape, VOCAB))
    nats = score(objective, logits, filled, noised).bound
    other = jnp.where((filled == padding)[..., None], 50.0, logits)
    np.testing.assert_array_equal(nats, score(objective, other, filled, noised).bound)
    assert float(nats[5]) == 0
    assert bool(jnp.isfinite(nats).all())
    gradient = jax.jit(jax.grad(lambda logits: score(objective, logits, filled, noised).bound.sum()))(logits)
    assert bool(jnp.isfinite(gradient).all())
    np.testing.assert_array_equal(gradient[filled == padding], 0.0)


def test_a_padded_rows_bound_is_that_of_its_tokens_alone() -> None:
    for estimator, length in product(("count", "constant_count"), (3, 8)):
        x_0 = jnp.full((64, 8), MASK_ID + 1).at[:, :length].set(0)
        nats = fast_nelbo(
            uniform, x_0, jax.random.key(0), schedule=make_schedule("linear"), mask_id=MASK_ID, estimator=estimator
        )
        np.testing.assert_allclose(nats, length * np.log(TOKENS), rtol=1e-5)


@pytest.mark.parametrize("options", [*OBJECTIVES, {"kind": "uniform"}], ids=lambda o: o["kind"])
def test_a_networks_bound_of_a_padded_row_is_that_of_the_row_cut_short_given_the_same_noise(
    options: dict[str, Any],
) -> None:
    objective, length = Objective(make_schedule("linear"), MASK_ID, **options), 5
    size = objective.traits.block_size(objective.block_size)
    model = randomised(vocab_size=VOCAB, conv_width=3, time_conditioning=True, block_size=size)
    cut = jax.random.randint(jax.random.key(1), (8, length), 0, TOKENS)
    x_0 = jnp.pad(cut, ((0, 0), (0, 4)), constant_values=MASK_ID)
    edges = segments(x_0, None, padding=MASK_ID)
    x_t, *of_rows = noised = objective.corrupt(x_0, jax.random.key(2), edges)
    blocks = -(-length // size) if of_rows[0].ndim == 2 else None
    short = Corruption(x_t[:, :length], *(value[:, :blocks] if blocks else value for value in of_rows))
    padded, alone = (
        objective.row_nats(objective.logits(model, ids, noise, of), ids, noise).bound
        for ids, noise, of in ((x_0, noised, edges), (cut, short, None))
    )
    np.testing.assert_allclose(padded, alone, rtol=1e-4)
    if not objective.mixed:
        fused = objective.fused_nats(objective.logits(model.features, x_0, noised, edges), model.table, x_0, noised)[1]
        np.testing.assert_allclose(fused.sum(), alone.sum(), rtol=1e-4)


@pytest.mark.parametrize(
    ("weighting", "options"),
    [
        ("clipped", OBJECTIVES[1]),
        ("clipped", OBJECTIVES[3]),
        ("uniform", OBJECTIVES[0]),
        ("uniform", OBJECTIVES[2]),
        ("uniform", OBJECTIVES[3]),
    ],
    ids=lambda value: value if isinstance(value, str) else value["kind"],
)
def test_a_weighting_changes_the_loss_and_never_the_bound(options: dict[str, Any], weighting: Weighting) -> None:
    x_0 = jax.random.randint(jax.random.key(1), (16, LENGTH), 0, TOKENS)
    plain, other = (
        Objective(make_schedule("linear"), MASK_ID, weighting=w, max_weight=1.5, **options)
        for w in ("bound", weighting)
    )
    noised = noise(plain, x_0, jax.random.key(0))
    logits = wrong(noised.x_t, noised.t)
    exact, changed = score(plain, logits, x_0, noised), score(other, logits, x_0, noised)
    np.testing.assert_array_equal(exact.loss, exact.bound)
    np.testing.assert_array_equal(exact.bound, changed.bound)
    if plain.kind == "autoregressive":
        np.testing.assert_array_equal(changed.loss, changed.bound)
    elif weighting == "clipped":
        assert bool((changed.loss <= changed.bound * (1 + 1e-6)).all())
        assert float(changed.loss.sum()) < float(changed.bound.sum())
    else:
        per_row = exact.bound / np.asarray(changed.loss)
        assert per_row.std() > 0.1  # not just another scale
        if not plain.mixed:
            nats = cross_entropy(logits, x_0, noised.x_t == MASK_ID, mask_id=MASK_ID).sum(axis=1)
            np.testing.assert_allclose(changed.loss, 2 * nats, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "share", "weighting"), [("hybrid", 0.1, "bound"), ("hybrid", 0.1, "uniform"), ("uniform", 1.0, "clipped")]
)
def test_under_mixed_noise_every_weighting_is_least_for_the_law_given_the_other_positions(
    kind: KindName, share: float, weighting: Weighting
) -> None:
    """One token, so nothing else is known: the best prediction is its law, whatever x_t says."""
    law = np.array([0.5, 0.3, 0.2])
    objective = Objective(
        make_schedule("linear"), MASK_ID, kind=kind, uniform_share=0.1, weighting=weighting, max_weight=2.0
    )
    states = np.array([0, 1, 2] if kind == "uniform" else [0, 1, 2, MASK_ID])
    x_0, x_t, t = (a.reshape(-1) for a in np.meshgrid(np.arange(3), states, [0.2, 0.5, 0.9], indexing="ij"))
    at = shares(jnp.asarray(t, jnp.float32), share)
    chance = law[x_0] * np.where(x_t == MASK_ID, at.masked, at.kept * (x_t == x_0) + at.uniform / TOKENS)
    rate, ones = jnp.asarray(t, jnp.float32), jnp.ones(len(t))
    noised = Corruption(jnp.asarray(x_t[:, None], jnp.int32), rate, rate, ones, ones)

    @jax.jit
    def slope(own: jax.Array) -> jax.Array:
        def loss(logits: jax.Array) -> jax.Array:
            every = jnp.pad(logits[x_t], ((0, 0), (0, VOCAB - TOKENS)))[:, None]
            return jnp.sum(chance * objective.row_nats(every, jnp.asarray(x_0[:, None], jnp.int32), noised).loss)

        return jax.grad(loss)(own)

    # One prediction for each x_t: all are the law itself where the loss is least.
    best = jnp.log(jnp.tile(jnp.asarray(law, jnp.float32), (len(states), 1)))
    np.testing.assert_allclose(slope(best), 0.0, atol=1e-5)
    assert float(jnp.abs(slope(0 * best)).max()) > 1e-2


@pytest.mark.slow
def test_weights_of_counted_mixed_noise_are_least_for_that_law_too() -> None:
    """Rows of independent tokens: what is drawn for others must not tell the best prediction of one."""
    law = jnp.float32([0.5, 0.3, 0.2])
    rows = jax.random.categorical(jax.random.key(0), jnp.log(law), shape=(4096, 4)).astype(jnp.int32)
    objective = Objective(
        make_schedule("linear"), MASK_ID, kind="uniform", estimator="count", weighting="clipped", max_weight=3.0
    )

    @jax.jit
    def slope(own: jax.Array) -> jax.Array:
        def loss(own: jax.Array, key: jax.Array) -> jax.Array:
            noised = objective.corrupt(rows, key)
            logits = jnp.pad(own, ((0, 0), (0, VOCAB - TOKENS)))[noised.x_t]
            return objective.row_nats(logits, rows, noised).loss.mean()

        return jax.lax.map(lambda key: jax.grad(loss)(own, key), jax.random.split(jax.random.key(1), 64))

    slopes = np.asarray(slope(jnp.log(jnp.tile(law, (3, 1)))), np.float64)
    error = slopes.std(axis=0, ddof=1) / 8
    assert (np.abs(slopes.mean(axis=0)) < 4.5 * error + 1e-4).all()
    assert error.max() < 0.01  # a weight that tells the count is off by 0.03 and more


def test_a_network_that_reads_other_positions_than_the_objective_is_refused() -> None:
    options = {"schedule": make_schedule("linear"), "mask_id": MASK_ID}
    x_0 = jnp.zeros((2, LENGTH), jnp.int32)
    causal, both_ways = randomised(vocab_size=VOCAB, block_size=1), randomised(vocab_size=VOCAB)
    with pytest.raises(ValueError, match="block_size 1 does not fit the absorbing objective, which needs 0"):
        nelbo(causal, x_0, jax.random.key(0), **options)
    with pytest.raises(ValueError, match="block_size 0 does not fit the autoregressive objective, which needs 1"):
        nelbo(both_ways, x_0, jax.random.key(0), objective="autoregressive", **options)


@pytest.mark.parametrize("options", OBJECTIVES[1:], ids=lambda o: o["kind"])
def test_true_tokens_under_masks_reach_neither_the_noised_row_nor_the_logits(options: dict[str, Any]) -> None:
    objective = Objective(make_schedule("linear"), MASK_ID, **options)
    model = randomised(vocab_size=VOCAB, block_size=objective.traits.block_size(3), conv_width=3)
    x_0 = jax.random.randint(jax.random.key(1), (16, LENGTH), 0, TOKENS)
    key = jax.random.key(5)
    noised = noise(objective, x_0, key)
    # Position 7 is in the last block, and no later one may read it.
    other = x_0.at[:, 7].set((x_0[:, 7] + 1) % TOKENS)
    again = noise(objective, other, key)
    hidden = noised.x_t[:, 7] != x_0[:, 7]  # masked, replaced, or not yet given
    assert bool(hidden.any())
    np.testing.assert_array_equal(noised.x_t[hidden], again.x_t[hidden])
    run = nnx.jit(lambda model, x, n: objective.logits(model, x, n))
    before, after = (run(model, x, n) for x, n in ((x_0, noised), (other, again)))
    np.testing.assert_array_equal(before[hidden], after[hidden])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "exact"}, "unknown name 'exact': choose continuous, discrete, count or constant_count"),
        ({"times": "stratifed"}, "unknown name 'stratifed'"),
        ({"num_timesteps": 0}, "num_timesteps must be at least 1, not 0"),
        ({"block_size": 0, "kind": "block"}, "block_size must be at least 1, not 0"),
        ({"kind": "hybrid", "uniform_share": 1.0}, "must lie between 0 and 1"),
        ({"kind": "uniform", "estimator": "constant_count"}, "needs the continuous or count estimator and a schedule"),
        ({"kind": "hybrid", "schedule": make_schedule("loglinear")}, "not continuous with loglinear"),
    ],
)
def test_an_objective_that_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make = inspect.unwrap(Objective.__init__)  # without checks of types
        make(object.__new__(Objective), **{"schedule": make_schedule("linear"), "mask_id": MASK_ID, **options})


# The plain recipe gives the same numbers.


class Seen:
    """A denoiser that keeps what it was given last."""

    def __init__(self, denoise: Denoise):
        self.denoise = denoise

    def __call__(self, x_t: jax.Array, t: jax.Array) -> jax.Array:
        self.noised = Corruption(x_t, t, t, 1 / t, jnp.ones_like(t))
        return self.denoise(x_t, t)


def test_the_plain_bound_is_term_by_term_that_of_the_objective_given_the_same_noise() -> None:
    x_0, key = jax.random.randint(jax.random.key(1), (64, LENGTH), 0, TOKENS), jax.random.key(2)
    seen = Seen(wrong)
    plain = plain_nelbo(seen, x_0, key, mask_id=MASK_ID)
    objective = Objective(make_schedule("linear"), MASK_ID, times="independent")
    logits = objective.logits(wrong, x_0, seen.noised)
    np.testing.assert_allclose(plain, objective.row_nats(logits, x_0, seen.noised).bound, rtol=1e-5)
    # Its noise is what `corrupt` draws: independent times in (0, 1], and each token masked with that probability.
    np.testing.assert_allclose(seen.noised.weight, objective.schedule.weight(seen.noised.t), rtol=1e-6)
    x_t = q_sample(x_0, seen.noised.t, jax.random.split(key)[1], mask_id=MASK_ID)
    np.testing.assert_array_equal(seen.noised.x_t, x_t)


def test_the_fused_path_gives_the_plain_numbers_and_gradients_on_a_network() -> None:
    x_0, key = jax.random.randint(jax.random.key(1), (8, LENGTH), 0, TOKENS), jax.random.key(2)
    graphdef, params = nnx.split(randomised(vocab_size=VOCAB, conv_width=3, time_conditioning=True))
    seen = Seen(uniform)
    plain_nelbo(seen, x_0, key, mask_id=MASK_ID)
    noised, objective = seen.noised, Objective(make_schedule("linear"), MASK_ID)

    def plain(params: Any) -> jax.Array:
        return plain_nelbo(nnx.merge(graphdef, params), x_0, key, mask_id=MASK_ID).sum()

    def fused(params: Any) -> jax.Array:
        model = nnx.merge(graphdef, params)
        features = objective.logits(model.features, x_0, noised)
        return objective.fused_nats(features, model.table, x_0, noised, chunks=3)[0]

    (value, gradient), (fused_value, fused_gradient) = (jax.jit(jax.value_and_grad(f))(params) for f in (plain, fused))
    np.testing.assert_allclose(fused_value, value, rtol=1e-5)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5 * largest)
    jax.tree.map(close, fused_gradient, gradient)
