"""The plain recipe that benchmarks compare with begins as textbooks have it."""

import math

import jax
import pytest
from flax import nnx

from nanodlm.training import plain


@pytest.mark.slow
def test_the_plain_network_is_normal_with_deviation_0_02_and_moves_by_its_rate() -> None:
    model = plain.make_network(384, n_layers=1, n_heads=2, d_model=32, d_ff=64)
    graphdef, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name = path[-1].key  # type: ignore[attr-defined]
        assert (leaf == 1).all() if name == "scale" else float(leaf.std()) == pytest.approx(0.02, rel=0.1)
    rows = jax.random.randint(jax.random.key(1), (1, 32, 32), 0, 257)
    step = jax.jit(plain.plain_step, static_argnames=("graphdef", "mask_id"))
    new, scalars = step(plain.init_state(params), rows, jax.random.key(0), graphdef=graphdef, mask_id=257)
    assert int(new["step"]) == 1
    assert abs(float(scalars["loss"]) - math.log(257)) < 1
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), new["model_state"], params)
    assert max(jax.tree.leaves(moved)) == pytest.approx(3e-4, rel=0.1)  # Adam's first step is the learning rate
