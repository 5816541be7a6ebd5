from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from nanodlm.diffusion.cross_entropy import cross_entropy, linear_cross_entropy
from nanodlm.diffusion.objective import Objective
from nanodlm.diffusion.schedules import make_schedule


def test_cross_entropy_takes_its_softmax_in_float32() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 64, 5)), jnp.bfloat16)
    nats = cross_entropy(logits, jnp.zeros((2, 64), jnp.int32), jnp.ones((2, 64), bool), mask_id=3)
    exact = np.asarray(logits.astype(jnp.float32), np.float64)[..., :3]
    assert nats.dtype == jnp.float32
    np.testing.assert_allclose(nats, np.log(np.exp(exact).sum(-1)) - exact[..., 0], rtol=1e-4)


def linear_problem(rows: int, length: int, dtype: str = "float32") -> tuple[jax.Array, jax.Array]:
    """Features and an output layer whose logits are large enough to matter."""
    features = jax.random.normal(jax.random.key(1), (rows, length, 16)).astype(dtype)
    return features, jax.random.normal(jax.random.key(2), (13, 16))


@pytest.mark.parametrize(
    ("options", "rows", "chunks"),
    [
        ({"kind": "absorbing", "estimator": "constant_count", "weighting": "clipped", "max_weight": 1.5}, 4, 3),
        ({"kind": "absorbing", "estimator": "continuous", "times": "independent"}, 4, 3),
        ({"kind": "block", "estimator": "constant_count", "block_size": 3}, 4, 2),
        ({"kind": "autoregressive", "estimator": "constant_count"}, 3, 2),
    ],
    ids=str,
)
def test_the_fused_loss_and_its_gradients_are_those_of_all_logits(
    options: dict[str, Any], rows: int, chunks: int
) -> None:
    """Row lengths that no block size divides, padding, and a number of chunks that divides nothing."""
    objective = Objective(make_schedule("linear"), 10, **options)
    x_0 = jax.random.randint(jax.random.key(5), (rows, 7), 0, 10).at[1, 5:].set(11)
    features, table = linear_problem(rows, 7)

    @jax.jit
    def both(features: jax.Array, table: jax.Array, key: jax.Array) -> Any:
        noised = objective.corrupt(x_0, key)

        def plain(features: jax.Array, table: jax.Array) -> tuple[jax.Array, jax.Array]:
            nats = objective.row_nats(features @ table.T, x_0, noised)
            return nats.loss.sum(), nats.bound.sum()

        def fused(features: jax.Array, table: jax.Array) -> tuple[jax.Array, jax.Array]:
            loss, bounds = objective.fused_nats(features, table, x_0, noised, chunks=chunks)
            return loss, bounds.sum()

        of = partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
        return of(plain)(features, table), of(fused)(features, table)

    for seed in range(5):
        expected, got = both(features, table, jax.random.key(seed))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5), got, expected)


@pytest.mark.parametrize(("rows", "block_size"), [(2, 1), (6, 3), (6, 12)])
def test_pairs_of_rows_never_have_more_masks_than_the_fused_loss_computes(rows: int, block_size: int) -> None:
    """Whatever is padding; these are fewer than the whole pair but for blocks of one token."""
    objective = Objective(make_schedule("linear"), 10, kind="block", estimator="constant_count", block_size=block_size)
    most = objective.most_scored(rows, 12)

    @jax.jit
    @jax.vmap
    def masks(seed: jax.Array) -> jax.Array:
        key, pad_key = jax.random.split(jax.random.key(seed))
        padding = jax.random.bernoulli(pad_key, seed / 50, (rows, 12))
        return (objective.corrupt(jnp.where(padding, 11, 3), key).x_t.reshape(rows // 2, 24) == 10).sum(axis=1)

    counts = np.asarray(masks(jnp.arange(50)))
    assert counts.shape == (50, rows // 2)
    assert 0 < counts.max() <= most == -(-12 // block_size) * (block_size + 1)
    assert most < 24 or block_size == 1


def test_the_fused_gradient_agrees_with_finite_differences_in_float64() -> None:
    with jax.enable_x64(True):
        features, table = (v.astype(jnp.float64) for v in linear_problem(2, 5))
        target = jnp.arange(10).reshape(2, 5)
        weight = jax.random.uniform(jax.random.key(0), (2, 5), jnp.float64)

        def loss(features: jax.Array, table: jax.Array, weight: jax.Array) -> jax.Array:
            values = (jnp.asarray(v) for v in (features, table, target, weight))
            return linear_cross_entropy(*values, mask_id=10, chunks=2)[0]

        check = partial(jax.test_util.check_grads, order=1, modes=["rev"], rtol=1e-6, atol=1e-6)
        check(jax.jit(loss), (features, table, weight))
        unscored = weight.at[0, 2].set(0.0)  # it has no derivative there, for what has no weight is not scored
        check(jax.jit(lambda features, table: loss(features, table, unscored)), (features, table))


def test_half_precision_features_give_float32_losses_close_to_those_of_float32() -> None:
    target, weight = jnp.arange(10).reshape(2, 5), jnp.ones((2, 5))

    def loss(dtype: str) -> Any:
        features, table = linear_problem(2, 5, dtype)
        of = partial(linear_cross_entropy, target=target, weight=weight, mask_id=10)
        both = jax.jit(jax.value_and_grad(lambda f, t: of(f, t), argnums=(0, 1), has_aux=True))
        (value, nats), grads = both(features, table)
        assert (value.dtype, nats.dtype, grads[0].dtype, grads[1].dtype) == ("float32", "float32", dtype, "float32")
        return value, grads

    half, full = loss("bfloat16"), loss("float32")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.03, atol=0.06), half, full)


def test_large_logits_neither_overflow_nor_lose_the_rare_token() -> None:
    features, table = jnp.ones((1, 2, 1)), jnp.asarray([[300.0], [-300.0], [0.0]])
    (_, nats), gradient = jax.value_and_grad(
        lambda f: linear_cross_entropy(f, table, jnp.asarray([[0, 1]]), jnp.ones((1, 2)), mask_id=2), has_aux=True
    )(features)
    np.testing.assert_allclose(nats, [[0.0, 600.0]])
    assert np.isfinite(gradient).all()


def test_chunks_that_would_hold_nothing_but_filling_are_not_made() -> None:
    shapes = jnp.ones((3, 16, 4)), jnp.ones((8, 4)), jnp.ones((3, 16), int), jnp.ones((3, 16))
    made = jax.make_jaxpr(partial(linear_cross_entropy, mask_id=7, chunks=12))(*shapes)  # 16 positions, two at a time
    assert "length=8" in str(made)
    assert "length=12" not in str(made)
