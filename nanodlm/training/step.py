"""One update: its loss, its state, and its program on a mesh of devices. Nothing here knows of data or files."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from nanodlm.build import make_model
from nanodlm.checkpoints import State
from nanodlm.config import Config
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.devices.mesh import batch_sharding, cut, logit_chunks, make_mesh, shardings
from nanodlm.diffusion.corruption import Corruption
from nanodlm.errors import UsageError
from nanodlm.model.transformer import Transformer, count_parameters, segments
from nanodlm.training.optimizer import learning_rate, make_optimizer


def train_step(
    state: State,
    rows: Int[Array, "A B L"],
    key: Key[Array, ""],
    *,
    network: Transformer,
    optimizer: optax.GradientTransformation,
    config: Config,
) -> tuple[State, dict[str, Array]]:
    """Take one update from A micro-batches of B rows.

    The loss is the objective's in nats per token: summed over tokens, divided by all but padding. The noise of all
    micro-batches is drawn at once, so that its times are spread evenly over the whole update. The network is told where
    documents end if it carries the mark that ends them; only its structure is read.

    Returns:
        The new state, and scalars: `loss` (what was minimised), `nats_per_token` (the bound; with isolated documents
        that of rows whose document edges are known), `grad_norm`, and `skipped` when the state counts them.
    """
    graphdef, objective = nnx.graphdef(network), network.objective
    n_micro, n_rows, length = rows.shape
    chunks = logit_chunks(n_rows * length, objective.mask_id)
    flat = rows.reshape(-1, length)
    segment_ids = segments(flat, network.document_end, network.padding)
    # Tokens of a micro-batch: their mean, for all tokens of an update weigh the same.
    size = n_rows * length if network.padding is None else (flat != network.padding).sum() / n_micro
    noised = objective.corrupt(flat, jax.random.fold_in(key, state["step"]), segment_ids)
    micro = jax.tree.map(lambda a: a.reshape(n_micro, n_rows, *a.shape[1:]), (flat, noised, segment_ids))

    def loss_fn(
        params: Any, x_0: Int[Array, "B L"], noised: Corruption, segment_ids: Int[Array, "B L"] | None
    ) -> tuple[Array, Array]:
        model = nnx.merge(graphdef, params)
        if objective.mixed:
            nats = objective.row_nats(objective.logits(model, x_0, noised, segment_ids), x_0, noised)
            return jnp.mean(nats.loss) / (size / n_rows), jnp.mean(nats.bound) / (size / n_rows)
        features = objective.logits(model.features, x_0, noised, segment_ids)
        loss, bound = objective.fused_nats(features, model.table, x_0, noised, chunks=chunks)
        return loss / size, bound.sum() / size

    evaluate = jax.value_and_grad(loss_fn, has_aux=True)

    def accumulate(total: Any, batch: tuple[Array, Corruption, Array | None]) -> tuple[Any, None]:
        return jax.tree.map(lambda t, v: t + v / n_micro, total, evaluate(state["model_state"], *batch)), None

    if n_micro == 1:
        (loss, bound), grads = evaluate(state["model_state"], *jax.tree.map(lambda a: a[0], micro))
    else:
        zero = jax.tree.map(jnp.zeros_like, ((jnp.float32(0), jnp.float32(0)), state["model_state"]))
        ((loss, bound), grads), _ = jax.lax.scan(accumulate, zero, micro)
    return _apply(state, grads, loss, bound, optimizer, config)


def _apply(
    state: State, grads: Any, loss: Array, bound: Array, optimizer: optax.GradientTransformation, config: Config
) -> tuple[State, dict[str, Array]]:
    """Return the state after an update with these gradients, and what is logged of it."""
    updates, optimizer_state = optimizer.update(grads, state["optimizer_state"], state["model_state"])
    params = optax.apply_updates(state["model_state"], updates)
    new = {"model_state": params, "optimizer_state": optimizer_state, "step": state["step"] + 1}
    if "ema_state" in state:
        # The average starts as the parameters do; early on it follows them faster (arXiv:2206.00364, appendix).
        decay = jnp.minimum(config.train.ema_decay, (1 + state["step"]) / (10 + state["step"]))
        new["ema_state"] = optax.incremental_update(params, state["ema_state"], 1 - decay)
    scalars = {"loss": loss, "nats_per_token": bound, "grad_norm": optax.tree.norm(grads)}
    if "skipped" in state:
        fine = jnp.isfinite(loss) & jnp.isfinite(scalars["grad_norm"])
        new = jax.tree.map(partial(jnp.where, fine), new, {name: state[name] for name in new})
        new |= {"step": state["step"] + 1, "skipped": state["skipped"] + jnp.where(fine, 0, 1)}
        scalars["skipped"] = new["skipped"]
    return new, scalars


def init_state(config: Config, params: Any, optimizer: optax.GradientTransformation) -> State:
    """Return the state before the first update."""
    state = {"model_state": params, "optimizer_state": optimizer.init(params), "step": jnp.int32(0)}
    if config.train.skip_nonfinite:
        state["skipped"] = jnp.int32(0)
    return {**state, "ema_state": jax.tree.map(jnp.copy, params)} if config.train.ema_decay else state


class Program(NamedTuple):
    """What runs on the devices of a mesh; trace it under `jax.set_mesh(mesh)`."""

    mesh: Mesh
    network: Transformer  # its structure: arrays are shapes
    n_parameters: int
    initialise: Callable[[], State]  # makes the state before the first update, each part on its device
    rates: Any  # the jitted learning rates of AdamW and Muon, after so many updates, of which so many were skipped
    step: Any  # the jitted `train_step`, of (rates, state, rows, key); the state is donated
    state: State  # shapes, types and shardings
    rows: jax.ShapeDtypeStruct  # those of one update, likewise

    def update(self, state: State, rows: Array, key: Key[Array, ""]) -> tuple[State, dict[str, Array]]:
        """Take one update at the learning rates that are due, which scalars tell as `lr`; see `train_step`."""
        return self.step(self.rates(state["step"], state.get("skipped", 0)), state, rows, key)

    def compile(self, seed: int) -> partial[tuple[State, dict[str, Array]]]:
        """Compile one update ahead of time, without any data; the mesh may be of devices that only stand for others."""
        with jax.set_mesh(self.mesh):
            first = self.rates(jnp.int32(0), 0)
            key = jax.eval_shape(lambda: jax.random.key(seed))
            return partial(self.step.lower(first, self.state, self.rows, key).compile(), first)


def make_program(config: Config, vocabulary: Vocabulary) -> Program:
    """Return the training program of a configuration, on a mesh of all devices."""
    # Seeds and learning rates are arguments of what is compiled, so that what is kept of it serves all of them.
    train, heads = config.train, config.model.n_heads
    mesh = make_mesh(train.batch_size, fsdp=train.fsdp, tensor=train.tensor)
    if heads % train.tensor:
        raise UsageError(f"--model.n_heads {heads} cannot be shared by --train.tensor {train.tensor}: use a divisor")
    network, schedule = nnx.eval_shape(lambda: make_model(config, vocabulary)), learning_rate(train)
    peaks = jnp.array([1.0, train.muon_lr / train.lr])

    def initialise(seed: int) -> State:
        params = nnx.to_pure_dict(nnx.split(make_model(config, vocabulary, seed))[1])
        return init_state(config, params, make_optimizer(train))

    def update(rates: Float[Array, "2"], state: State, *batch: Any) -> tuple[State, dict[str, Array]]:
        optimizer = make_optimizer(train, rates)
        state, scalars = train_step(state, *batch, network=network, optimizer=optimizer, config=config)
        return state, scalars | {"lr": rates[0]}

    with jax.set_mesh(mesh):  # as it is called, so that it is traced once
        shapes = jax.eval_shape(initialise, 0)
    cuts, everywhere = shardings(mesh, shapes), jax.NamedSharding(mesh, cut())
    shape = (train.grad_acc_steps, train.batch_size, config.model.seq_len)
    return Program(
        mesh,
        network,
        count_parameters(network),
        partial(jax.jit(initialise, out_shardings=cuts), config.model.init_seed),
        jax.jit(lambda step, skipped: peaks * schedule(step - skipped), out_shardings=everywhere),
        jax.jit(update, donate_argnums=1, out_shardings=(cuts, everywhere)),
        jax.tree.map(lambda leaf, held: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=held), shapes, cuts),
        jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh, axis=1)),
    )


@jax.jit
def all_finite(tree: Any) -> Bool[Array, ""]:
    """Return whether no array of a tree holds a NaN or an infinity."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
