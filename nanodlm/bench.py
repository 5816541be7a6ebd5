"""Measurements that anyone can rerun.

nanodlm bench variance demo      # how much the estimators of the bound and of its gradient vary
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Key

from nanodlm import shards, stages
from nanodlm.checkpoint import load_folder, make_objective
from nanodlm.config import Config, load_config
from nanodlm.errors import UsageError
from nanodlm.losses import Objective
from nanodlm.store import Store

# Label, estimator, and how its times or counts are spread over the rows.
ESTIMATORS = (
    ("continuous, independent", "continuous", "independent"),
    ("continuous, stratified", "continuous", "stratified"),
    ("continuous, systematic", "continuous", "systematic"),
    ("count, independent", "count", "independent"),
    ("count, systematic", "count", "systematic"),
    ("constant count, systematic", "constant_count", "systematic"),
)


def variance(
    config: Config, store: Store, *, draws: int = 1024, emit: Callable[..., None] = lambda *_, **__: None
) -> list[dict[str, Any]]:
    """How much the bound of one batch, and its gradient, vary with the noise: a row for each estimator.

    The network and its data are those of the configuration's finished run; the batch is `train.batch_size` rows from
    the front of the validation split, the same in every draw, so that noise is all that varies.

    Returns:
        Rows with `estimator`; `bound`, the mean over all draws in nats per token, and `bound_error`, its standard
        error; `bound_sd`, the standard deviation of one batch's bound; `gradient_noise`, E|g - Eg|^2 / |Eg|^2 for the
        gradient g of the bound, both estimated without bias.

    Raises:
        UsageError: For a model that was not trained on masked rows or blocks, an odd batch, or fewer than two draws.
        NanodlmError: When the run is not in the store.

    Example:
        rows = variance(nanodlm.PRESETS["demo"], Store("data/store"))
    """
    if config.objective.kind not in ("absorbing", "block"):
        raise UsageError(
            f"{config.objective.kind} has no estimators to compare: use --objective.kind absorbing or block"
        )
    if draws < 2:
        raise UsageError(f"a variance takes two draws and more, not {draws}: raise --draws")
    if config.train.batch_size % 2:
        raise UsageError(f"constant counts pair rows: use an even --train.batch_size, not {config.train.batch_size}")
    _, inputs = stages.ready("evaluate", config, store)
    run, held_out = inputs["train"].local(), inputs["shard"].local(only="validation")
    model, encoding = load_folder(run)
    rows = shards.read(held_out / "validation.arrayrecord", inputs["shard"].metrics["dtype"])
    rows = [row for row in rows if len(row) == len(rows[0])][: config.train.batch_size]
    if len(rows) < config.train.batch_size:
        raise UsageError(f"the validation split has {len(rows)} whole rows: raise --data.val_tokens")
    x_0 = jnp.asarray(np.stack(rows))
    graphdef, params = nnx.split(model)
    trained = make_objective(load_config(str(run / "config.json")), encoding)

    def bound(params: Any, objective: Objective, key: Key[Array, ""]) -> Array:
        network = nnx.merge(graphdef, params)
        noised = objective.corrupt(x_0, key)
        return objective.row_nats(objective.logits(network, x_0, noised), x_0, noised).bound.mean() / x_0.shape[1]

    def measure(objective: Objective) -> tuple[Array, Array, Array]:
        def step(total: Any, key: Key[Array, ""]) -> tuple[Any, Array]:
            nats, gradient = jax.value_and_grad(bound)(params, objective, key)
            squares = sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradient))
            return (jax.tree.map(jnp.add, total[0], gradient), total[1] + squares), nats

        zero = (jax.tree.map(jnp.zeros_like, params), jnp.float32(0))
        (gradients, squares), nats = jax.lax.scan(step, zero, jax.random.split(jax.random.key(0), draws))
        return nats, sum((jnp.vdot(g, g) for g in jax.tree.leaves(gradients)), jnp.float32(0)) / draws**2, squares

    table = []
    for i, (label, estimator, times) in enumerate(ESTIMATORS):
        objective = replace(trained, estimator=estimator, times=times, weighting="bound")
        nats, square_of_mean, squares = map(np.float64, jax.jit(measure, static_argnums=0)(objective))
        spread = (squares - draws * square_of_mean) / (draws - 1)
        table.append(
            {
                "estimator": label,
                "bound": float(nats.mean()),
                "bound_error": float(nats.std(ddof=1)) / math.sqrt(draws),
                "bound_sd": float(nats.std(ddof=1)),
                "gradient_noise": float(spread / (square_of_mean - spread / draws)),
            }
        )
        emit("progress", done=i + 1, total=len(ESTIMATORS), unit="estimators")
    return table
