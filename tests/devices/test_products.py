"""Products and attention: equal to what they are short for, in value and gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanodlm.devices.products import attention, convolve, neighbours, product

SIZES = {"b": 3, "q": 5, "k": 6, "h": 2, "e": 4, "n": 7, "d": 8, "v": 9}
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
EQUATIONS = ("nd,de->ne", "nd,vd->nv", "bqhe,bkhe->bhqk", "bhqk,bkhe->bqhe")


def arrays(equation: str) -> list[jax.Array]:
    rng, sides = np.random.default_rng(0), equation.split("->")[0].split(",")
    return [jnp.asarray(rng.normal(size=[SIZES[axis] for axis in side]), jnp.float32) for side in sides]


@pytest.mark.parametrize("equation", EQUATIONS)
def test_a_product_and_its_gradients_are_those_of_einsum(equation: str) -> None:
    def loss(multiply, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sin(multiply(a, b)).sum()

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(1, 2)), static_argnums=0)
    ours = gradient(partial(product, equation, jnp.dtype("float32")), *arrays(equation))
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
        ours,
        gradient(partial(jnp.einsum, equation), *arrays(equation)),
    )


@pytest.mark.parametrize("equation", EQUATIONS)
def test_bfloat16_rounds_what_is_multiplied_and_neither_sums_nor_gradients(equation: str) -> None:
    a, b = arrays(equation)
    dtype = jnp.dtype("bfloat16")
    rounded = [np.asarray(x.astype(dtype), np.float64) for x in (a, b)]
    result, pull = jax.vjp(jax.jit(partial(product, equation, dtype)), a, b)
    assert result.dtype == np.float32
    close(result, np.einsum(equation, *rounded))
    d_a, d_b = pull(jnp.ones_like(result))
    assert d_a.dtype == d_b.dtype == np.float32
    assert np.any(d_b != d_b.astype(dtype).astype(np.float32))


def test_the_gradient_of_a_convolution_is_that_of_the_sum_that_it_is() -> None:
    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return sum((near * of for near, of in zip(neighbours(x, 5, 0, 7), kernel, strict=True)), jnp.zeros(()))

    x, kernel, weight = (jnp.asarray(np.random.default_rng(0).normal(size=s)) for s in ((2, 7, 3), (5, 3), (2, 7, 3)))
    ours, sums = (jax.value_and_grad(lambda *a, f=f: (weight * f(*a)).sum(), (0, 1)) for f in (convolve, plain))
    jax.tree.map(close, ours(x, kernel), sums(x, kernel))


def test_attention_is_that_of_jax_where_rows_read_different_positions() -> None:
    q, k, v = (jnp.asarray(x) for x in np.random.default_rng(1).normal(size=(3, 2, 6, 2, 4)).astype(np.float32))
    mask = jnp.asarray(np.random.default_rng(2).random((2, 1, 6, 6)) < 0.6).at[..., 0].set(True)

    def value_and_gradients(attend, reads: jax.Array | None):
        loss = lambda *qkv: jnp.sin(attend(*qkv, mask=reads)).sum()  # noqa: E731
        return attend(q, k, v, mask=reads), jax.grad(loss, (0, 1, 2))(q, k, v)

    for reads in (mask, None):
        jax.tree.map(close, *(value_and_gradients(of, reads) for of in (attention, jax.nn.dot_product_attention)))
