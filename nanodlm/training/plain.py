"""The plain recipe that the project's own is measured against: what a first version of such a trainer does.

AdamW at 3e-4, float32, N(0, 0.02) for every matrix and embedding, independent times, and every logit
computed and stored.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Int, Key

from nanodlm.diffusion.cross_entropy import predictable
from nanodlm.model.transformer import Transformer

ADAMW = optax.adamw(3e-4, b1=0.9, b2=0.95, weight_decay=0.1)


def make_network(vocab_size: int, *, n_layers: int, n_heads: int, d_model: int, d_ff: int) -> Transformer:
    """Return a usual transformer, with an output layer of its own and without normalised queries and keys.

    >>> make_network(64, n_layers=1, n_heads=2, d_model=8, d_ff=16)(jnp.zeros((1, 4), int), jnp.ones(1)).shape
    (1, 4, 64)
    """
    shape = {"n_layers": n_layers, "n_heads": n_heads, "d_model": d_model, "d_ff": d_ff}
    network = partial(Transformer, vocab_size=vocab_size, **shape, qk_norm=False, zero_init=False)
    graphdef, params = nnx.split(network(rngs=nnx.Rngs(0)))
    leaves, tree = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(params))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [
        jnp.ones_like(leaf) if path[-1].key == "scale" else 0.02 * jax.random.normal(key, leaf.shape)
        for key, (path, leaf) in zip(keys, leaves, strict=True)
    ]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, drawn))


def init_state(params: Any) -> dict[str, Any]:
    """Return the state before the first update."""
    return {"model_state": params, "optimizer_state": ADAMW.init(params), "step": jnp.int32(0)}


def plain_step(
    state: dict[str, Any], rows: Int[Array, "1 B L"], key: Key[Array, ""], *, graphdef: nnx.GraphDef, mask_id: int
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Take one update as textbooks have it: tokens masked with probability t, cross-entropies over t."""
    x_0 = rows[0]
    time_key, mask_key = jax.random.split(jax.random.fold_in(key, state["step"]))
    t = 1 - jax.random.uniform(time_key, (len(x_0),))
    masked = jax.random.uniform(mask_key, x_0.shape) < t[:, None]

    def loss_fn(params: Any) -> Array:
        model = nnx.merge(graphdef, params)
        features = model.features(jnp.where(masked, mask_id, x_0), t)
        logits = jnp.einsum("bld,vd->blv", features, model.table)
        nats = optax.softmax_cross_entropy_with_integer_labels(predictable(logits, mask_id=mask_id), x_0)
        return jnp.mean(masked * nats / t[:, None])

    params = state["model_state"]
    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, optimizer_state = ADAMW.update(grads, state["optimizer_state"], params)
    params = optax.apply_updates(params, updates)
    return {"model_state": params, "optimizer_state": optimizer_state, "step": state["step"] + 1}, {"loss": loss}
