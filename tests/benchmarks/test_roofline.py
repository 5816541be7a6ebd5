"""Products of a compiled program are found, and counted as often as they are done."""

import jax
import jax.numpy as jnp

from benchmarks.roofline import dots
from nanodlm.devices.products import product


def test_products_in_and_out_of_loops_are_counted() -> None:
    def program(x: jax.Array, w: jax.Array) -> jax.Array:
        x, _ = jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=7)
        return x @ x.T

    hlo = jax.jit(program).lower(jnp.ones((16, 24)), jnp.ones((24, 24))).compile().as_text()
    assert hlo
    assert sorted((count, dot.flops) for dot, count in dots(hlo).items()) == [
        (1, 2 * 16 * 24 * 16),
        (7, 2 * 16 * 24 * 24),
    ]


def test_gradients_are_multiplied_in_the_type_of_the_forward_pass_whichever_axes_are_summed() -> None:
    def loss(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.square(product("nd,de->ne", jnp.dtype("bfloat16"), a, b)).sum()

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(jnp.ones((128, 64)), jnp.ones((64, 96))).compile()
    found = dots(compiled.as_text() or "")
    assert (sum(found.values()), len({dot.types for dot in found})) == (3, 1)
