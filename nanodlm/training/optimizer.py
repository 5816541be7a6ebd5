"""AdamW and Muon, their learning-rate schedules, clipping."""

from typing import Any

import jax
import optax
import optax.contrib
from jaxtyping import Array, Float

from nanodlm.config import TrainConfig


def learning_rate(train: TrainConfig) -> optax.Schedule:
    """Return the learning rate as a function of the number of updates done.

    | lr_schedule | after a linear rise from 0 over warmup_steps |
    |---|---|
    | warmup_cosine | a half cosine from lr to min_lr at max_steps |
    | warmup_stable_decay | lr, then a line to min_lr over the last cooldown_steps |
    | warmup_constant | lr |
    | none | lr from the first update on, without the rise |

    A run too short for both gives the rise its updates first, and the decay what is left.

    >>> schedule = learning_rate(TrainConfig(lr=1.0, lr_schedule="warmup_constant", warmup_steps=4, max_steps=9))
    >>> [round(float(schedule(i)), 2) for i in (0, 1, 3, 4, 8)]
    [0.25, 0.5, 1.0, 1.0, 1.0]
    """
    warmup = 0 if train.lr_schedule == "none" else min(train.warmup_steps, train.max_steps)
    left = max(1, train.max_steps - warmup)
    after = optax.constant_schedule(train.lr)
    if train.lr_schedule == "warmup_cosine":
        after = optax.cosine_decay_schedule(train.lr, left, alpha=train.min_lr / train.lr)
    elif train.lr_schedule == "warmup_stable_decay":
        cooldown = min(train.cooldown_steps, left)
        decay = optax.linear_schedule(train.lr, train.min_lr, max(1, cooldown))
        after = optax.join_schedules([after, decay], [left - cooldown])
    if not warmup:
        return after
    # The first update has a rate of lr / warmup_steps, not 0, so that no update is wasted.
    rise = optax.linear_schedule(train.lr / warmup, train.lr, max(1, warmup - 1))
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(train: TrainConfig, rates: Float[Array, "2"] | None = None) -> optax.GradientTransformation:
    """Return clipping by global norm, then AdamW, or Muon for the blocks' matrices and AdamW for the rest.

    Weight decay acts on the matrices of linear layers only. With Muon the rest is optax's Adam with Nesterov momentum
    and no decay. `rates`, those of AdamW and Muon, stand for the configuration's. Sources: AdamW, arXiv:1711.05101,
    algorithm 2; Muon, arXiv:2502.16982, equation 1.
    """
    schedule = learning_rate(train) if rates is None else lambda _: rates[0]
    decay: dict[str, Any] = {"eps": train.eps, "weight_decay": train.weight_decay}
    if train.optimizer == "adamw":
        optimizer = optax.adamw(schedule, b1=train.beta1, b2=train.beta2, mask=is_matrix, **decay)
    else:
        adam: dict[str, Any] = {"adam_b1": train.beta1, "adam_b2": train.beta2, "adam_learning_rate": schedule}
        layers = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)  # of matrices inside blocks
        chosen = lambda path, matrix: layers if matrix and path[0].key == "blocks" else None  # noqa: E731
        tree_map = jax.tree_util.tree_map_with_path
        adam["muon_weight_dimension_numbers"] = lambda params: tree_map(chosen, is_matrix(params))
        rate = lambda count: schedule(count) * train.muon_lr / train.lr if rates is None else rates[1]  # noqa: E731
        optimizer = optax.contrib.muon(rate, ns_steps=3, **adam, **decay)
    clip = train.clip_grad_norm
    return optax.chain(optax.clip_by_global_norm(clip), optimizer) if clip else optimizer


def is_matrix(params: Any) -> Any:
    """Mark the parameters that are matrices of linear layers, an untied output layer's too.

    Norms, embeddings, biases and convolutions are none. Those inside blocks are stacked: their first axis is the layer.
    """

    def test(path: tuple[Any, ...], _: jax.Array) -> bool:
        names = [getattr(p, "key", None) for p in path]
        return names[0] == "head" or (names[-1] == "kernel" and "conv" not in names)

    return jax.tree_util.tree_map_with_path(test, params)
