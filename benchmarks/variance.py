"""Measure how much the estimators of the bound and of its gradient vary with the noise.

    python -m benchmarks.variance --draws 1024        # two CPU cores: a minute, and the demo's training before it

The network is that of the configuration's run, which is trained first unless the store holds it. The batch is
`train.batch_size` rows (an even number) from the front of the validation split, the same in every draw, so that noise
is all that varies.
"""

import math
from dataclasses import replace
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jaxtyping import Array, Key

from benchmarks.runs import build
from nanodlm.checkpoints.loading import load_artifact
from nanodlm.config import PRESETS, Config
from nanodlm.data.rows import read
from nanodlm.diffusion.objective import Objective
from nanodlm.errors import UsageError
from nanodlm.stages.run import default_store
from nanodlm.store import Store

ESTIMATORS = (  # and how their times or counts are spread over the rows
    ("continuous", "independent"),
    ("continuous", "stratified"),
    ("continuous", "systematic"),
    ("count", "independent"),
    ("count", "systematic"),
    ("constant_count", "systematic"),
)


def variance(
    config: Annotated[Config, tyro.conf.arg(name="")] = PRESETS["demo"],
    store: str = default_store(),
    draws: int = 1024,
) -> list[dict[str, Any]]:
    """Draw the bound of one batch and its gradient many times with each estimator, and compare their spread.

    Args:
        config: The run whose network and data are used; of masked rows or blocks.
        store: Where it lies: a folder or an fsspec URL.
        draws: Draws of noise for each estimator, two and more.

    Returns:
        Rows with `estimator`; `bound`, the mean over all draws in nats per token, and `bound_error`, its standard
        error; `bound_sd`, the standard deviation of one batch's bound; `gradient_noise`, E|g - Eg|^2 / |Eg|^2 for the
        gradient g of the bound, both estimated without bias.

    Raises:
        UsageError: For a kind of objective that has no estimators to compare.
    """
    if config.objective.kind not in ("absorbing", "block"):
        raise UsageError(f"{config.objective.kind} has no estimators to compare: use absorbing or block")
    artifacts = build(config, Store(store), "train")
    model, _ = load_artifact(artifacts["train"])
    rows = read(artifacts["shard"].file("validation.arrayrecord"), artifacts["shard"].metrics["dtype"])
    x_0 = jnp.asarray(np.stack(rows[: config.train.batch_size]))
    graphdef, params = nnx.split(model)

    def bound(params: Any, objective: Objective, key: Key[Array, ""]) -> Array:
        network = nnx.merge(graphdef, params)
        noised = objective.corrupt(x_0, key)
        return objective.row_nats(objective.logits(network, x_0, noised), x_0, noised).bound.mean() / x_0.shape[1]

    def measure(objective: Objective) -> tuple[Array, Array, Array]:
        def step(total: Any, key: Key[Array, ""]) -> tuple[Any, Array]:
            nats, gradient = jax.value_and_grad(bound)(params, objective, key)
            return (jax.tree.map(jnp.add, total[0], gradient), total[1] + _square(gradient)), nats

        zero = (jax.tree.map(jnp.zeros_like, params), jnp.float32(0))
        (gradients, squares), nats = jax.lax.scan(step, zero, jax.random.split(jax.random.key(0), draws))
        return nats, _square(gradients) / draws**2, squares

    trained, table = model.objective, []
    print("| estimator, times | bound, nats/token | standard deviation | variance | gradient noise | relative |")
    print("|---|---|---|---|---|---|")
    for estimator, times in ESTIMATORS:
        objective = replace(trained, estimator=estimator, times=times, weighting="bound")
        nats, square_of_mean, squares = map(np.float64, jax.jit(measure, static_argnums=0)(objective))
        spread = (squares - draws * square_of_mean) / (draws - 1)
        row = {
            "estimator": f"{estimator}, {times}",
            "bound": float(nats.mean()),
            "bound_error": float(nats.std(ddof=1)) / math.sqrt(draws),
            "bound_sd": float(nats.std(ddof=1)),
            "gradient_noise": float(spread / (square_of_mean - spread / draws)),
        }
        table.append(row)
        print(
            f"| {row['estimator']} | {row['bound']:.3f} ± {row['bound_error']:.3f} | {row['bound_sd']:.3f} "
            f"| {(row['bound_sd'] / table[0]['bound_sd']) ** 2:.3f} | {row['gradient_noise']:.1f} "
            f"| {row['gradient_noise'] / table[0]['gradient_noise']:.3f} |"
        )
    return table


def _square(tree: Any) -> Array:
    """Return the sum of the squares of all numbers of a tree of arrays."""
    return sum((jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(tree)), jnp.float32(0))


if __name__ == "__main__":
    tyro.cli(variance, use_underscores=True)
