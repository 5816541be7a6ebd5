"""One update: its loss, its noise, its gradients, and what it keeps."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from nanodlm.build import make_model
from nanodlm.checkpoints import State
from nanodlm.checkpoints.loading import parameters_sha256
from nanodlm.config import Config
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.diffusion import cross_entropy, nelbo
from nanodlm.diffusion import objective as diffusion_objective
from nanodlm.diffusion.corruption import Corruption
from nanodlm.diffusion.objective import Objective
from nanodlm.diffusion.schedules import make_schedule
from nanodlm.model.transformer import Transformer
from nanodlm.training.optimizer import make_optimizer
from nanodlm.training.step import init_state, make_program, train_step
from tests.support.laws import MASK_ID as CHAIN_MASK
from tests.support.laws import VOCAB, chain_log_p, chain_rows
from tests.training.test_optimizer import ENCODING, MASK_ID, TINY, assert_trees_close, fresh

ROWS = np.random.default_rng(0).integers(0, ENCODING.n_vocab, (8, 8)).astype(np.int32)
KEY = jax.random.key(9)
STILL = optax.sgd(0.0)  # leaves the parameters as they are


@cache
def compiled_step(config: Config, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    network = nnx.eval_shape(lambda: make_model(config, Vocabulary.of(ENCODING)))
    return jax.jit(partial(train_step, network=network, optimizer=optimizer, config=config))


def start_of(config: Config) -> tuple[nnx.GraphDef, Any]:
    return fresh(**config.model.model_dump(exclude={"init_seed"}))


def run_step(
    config: Config, rows: np.ndarray, optimizer: Any, *, key: jax.Array = KEY, start: Any = None, updates: int = 1
) -> tuple[State, list[dict[str, float]]]:
    """Take some updates on the same rows."""
    state = init_state(config, start_of(config)[1], optimizer) if start is None else start
    records = []
    for _ in range(updates):
        state, scalars = compiled_step(config, optimizer)(state, rows, key)
        records.append({name: float(value) for name, value in scalars.items()})
    return state, records


PADDED = np.where(np.arange(8) < np.array([[8], [2], [1], [5], [8], [3], [4], [2]]), ROWS, MASK_ID)


@pytest.mark.parametrize("rows", [ROWS, PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("kind", ["absorbing", pytest.param("hybrid", marks=pytest.mark.slow)])
def test_micro_batches_give_the_update_of_one_batch_of_their_rows(kind: str, rows: np.ndarray) -> None:
    # Plain gradient descent shows the gradient itself, of which Adam would show little more than the signs.
    descent = optax.sgd(0.5)
    config = TINY.replace(objective={"kind": kind}, data={"rows": "stream" if rows is ROWS else "document"})
    whole, of_whole = run_step(config, rows[None], descent, updates=2)
    parts, of_parts = run_step(config, rows.reshape(4, 2, 8), descent, updates=2)
    for one, four in zip(of_whole, of_parts, strict=True):
        assert four == pytest.approx(one, rel=1e-3)
        assert one["grad_norm"] > 1e-2
    assert_trees_close(parts["model_state"], whole["model_state"], rtol=1e-3, atol=1e-4)


def test_the_loss_of_padded_rows_is_the_mean_over_their_tokens_which_read_no_padding() -> None:
    config, rows = TINY.replace(objective={"kind": "autoregressive", "estimator": "count"}), PADDED[:4]
    _, [record] = run_step(config.replace(data={"rows": "document"}), rows.reshape(2, 2, 8), STILL)
    network = nnx.eval_shape(lambda: make_model(config, Vocabulary.of(ENCODING)))
    model = nnx.merge(nnx.graphdef(network), start_of(TINY)[1])
    alone = [jnp.asarray(row[row != MASK_ID])[None] for row in rows]
    total = sum(float(nelbo.nelbo(model, row, KEY)[0]) for row in alone)
    assert record["loss"] == pytest.approx(total / sum(row.size for row in alone), rel=1e-4)


def test_the_learning_rate_advances_by_updates_and_not_by_micro_batches() -> None:
    config = TINY.replace(train={"warmup_steps": 4, "optimizer": "adamw"})
    program = make_program(config, Vocabulary.of(ENCODING))
    with jax.set_mesh(program.mesh):
        state, rates = program.initialise(), []
        for _ in range(3):
            state, scalars = program.update(state, jnp.asarray(ROWS.reshape(4, 2, 8)), KEY)
            rates.append(float(scalars["lr"]))
    assert rates == pytest.approx([2e-3, 4e-3, 6e-3])
    assert int(state["step"]) == 3
    counts = [int(leaf) for leaf in jax.tree.leaves(state["optimizer_state"]) if leaf.ndim == 0]
    assert counts and set(counts) == {3}


def test_the_steps_loss_is_the_bound_per_token() -> None:
    discrete = {"estimator": "discrete", "num_timesteps": 5}
    config = TINY.replace(objective={"weighting": "bound", **discrete}, schedule={"kind": "cosine"})
    state, [record] = run_step(config, ROWS[None], STILL)
    model, schedule = nnx.merge(*start_of(config)), make_schedule("cosine")
    bound = partial(nelbo.nelbo, model, mask_id=MASK_ID, schedule=schedule, **discrete)
    expected = jax.jit(bound)(jnp.asarray(ROWS), jax.random.fold_in(KEY, 0))
    assert record["loss"] == pytest.approx(float(expected.mean()) / 8, rel=1e-4)
    assert record["nats_per_token"] == pytest.approx(record["loss"], rel=1e-5)
    assert set(state) == {"model_state", "optimizer_state", "step"}  # no average is kept unless asked for
    assert int(state["step"]) == 1


def test_uniform_weighting_changes_the_loss_but_not_the_bound_that_is_reported() -> None:
    _, [bound] = run_step(TINY, ROWS[None], STILL)
    _, [uniform] = run_step(TINY.replace(objective={"weighting": "uniform"}), ROWS[None], STILL)
    assert uniform["nats_per_token"] == pytest.approx(bound["nats_per_token"], rel=1e-5)
    graphdef, params = start_of(TINY)

    @jax.jit
    def unweighted(x_0: jax.Array, key: jax.Array) -> jax.Array:
        noised = diffusion_objective.Objective(make_schedule("linear"), MASK_ID).corrupt(x_0, key)
        scores = nnx.merge(graphdef, params)(noised.x_t, noised.t)
        return cross_entropy.cross_entropy(scores, x_0, noised.x_t == MASK_ID, mask_id=MASK_ID).sum(axis=1).mean() / 8

    expected = 2 * float(unweighted(jnp.asarray(ROWS), jax.random.fold_in(KEY, 0)))
    assert uniform["loss"] == pytest.approx(expected, rel=1e-4)


def test_every_step_draws_its_own_noise_from_the_seed_and_its_number() -> None:
    state, records = run_step(TINY, ROWS[None], STILL, updates=3)
    values = [r["nats_per_token"] for r in records]
    assert len(set(values)) == 3
    _, again = run_step(TINY, ROWS[None], STILL, updates=3)
    assert again == records
    _, [resumed] = run_step(TINY, ROWS[None], STILL, start={**state, "step": jnp.int32(1)})
    assert resumed == records[1]
    _, [other] = run_step(TINY, ROWS[None], STILL, key=jax.random.key(10))
    assert other["nats_per_token"] not in values


def test_the_average_of_the_parameters_follows_them_fast_at_first_and_slowly_later() -> None:
    config, optimizer = TINY.replace(train={"ema_decay": 0.9}), optax.sgd(0.5)
    state, _ = run_step(config, ROWS[None], optimizer)
    _, start = start_of(config)
    expected = jax.tree.map(lambda old, new: 0.1 * old + 0.9 * new, start, state["model_state"])
    assert_trees_close(state["ema_state"], expected, rtol=1e-5, atol=1e-6)
    later = {**state, "step": jnp.int32(10_000)}
    after, _ = run_step(config, ROWS[None], optimizer, start=later)
    expected = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, state["ema_state"], after["model_state"])
    assert_trees_close(after["ema_state"], expected, rtol=1e-5, atol=1e-6)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), after["ema_state"], after["model_state"])
    assert max(jax.tree.leaves(moved)) > 1e-3


class Fragile(Objective):
    """Has no finite loss for rows that begin with token 0."""

    def corrupt(self, x_0: jax.Array, key: jax.Array, segment_ids: jax.Array | None = None) -> Corruption:
        noised = super().corrupt(x_0, key, segment_ids)
        return noised._replace(weight=noised.weight / x_0[:, 0])


def test_an_update_that_is_not_finite_is_skipped_and_counted() -> None:
    config = TINY.replace(train={"skip_nonfinite": True, "ema_decay": 0.5, "batch_size": 2})
    objective = Fragile(make_schedule("linear"), 4, estimator="count")
    network = Transformer(vocab_size=5, n_layers=1, n_heads=1, d_model=4, d_ff=4, rngs=nnx.Rngs(0))
    params, network.objective = nnx.state(network), objective
    optimizer = make_optimizer(config.train)
    step = jax.jit(partial(train_step, network=network, optimizer=optimizer, config=config))
    good, bad = jnp.ones((1, 2, 8), jnp.int32), jnp.ones((1, 2, 8), jnp.int32).at[0, 1, 0].set(0)
    start = init_state(config, nnx.to_pure_dict(params), optimizer)
    first, said = step(start, good, jax.random.key(0))
    assert (int(first["step"]), int(first["skipped"]), int(said["skipped"])) == (1, 0, 0)
    second, said = step(first, bad, jax.random.key(0))
    assert (int(second["step"]), int(second["skipped"]), int(said["skipped"])) == (2, 1, 1)
    assert not np.isfinite(said["loss"])
    same = ("model_state", "optimizer_state", "ema_state")
    jax.tree.map(np.testing.assert_array_equal, {n: second[n] for n in same}, {n: first[n] for n in same})
    third, said = step(second, good, jax.random.key(0))
    assert int(third["skipped"]) == 1
    assert np.isfinite(said["loss"])
    assert parameters_sha256(third["model_state"]) != parameters_sha256(first["model_state"])


KINDS = ("absorbing", "block", "autoregressive", "uniform", "hybrid")


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS])
def test_a_tiny_network_trained_on_a_markov_chain_comes_within_two_percent_of_its_entropy(kind: str) -> None:
    length, rows, updates = 16, 64, 300
    config = Config().replace(
        train={"lr": 4e-3, "max_steps": updates, "warmup_steps": 20, "batch_size": rows, "weight_decay": 0.0},
    )
    objective = Objective(make_schedule("linear"), CHAIN_MASK, kind=kind, estimator="count", block_size=4)
    shape = {"n_layers": 2, "n_heads": 2, "d_model": 32, "d_ff": 64, "conv_width": 3, "rngs": nnx.Rngs(0)}
    block_size = objective.traits.block_size(4)
    network = Transformer(vocab_size=VOCAB, time_conditioning=objective.mixed, block_size=block_size, **shape)
    network.objective = objective
    graphdef, params = nnx.split(network)
    optimizer = make_optimizer(config.train)
    step = partial(train_step, network=network, optimizer=optimizer, config=config)

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1})  # long enough to gain from it
    def train(state: Any, key: jax.Array) -> Any:
        def update(state: Any, row_key: jax.Array) -> tuple[Any, jax.Array]:
            state, scalars = step(state, chain_rows(row_key, rows, length)[None], key)
            return state, scalars["nats_per_token"]

        return jax.lax.scan(update, state, jax.random.split(key, updates))[0]

    @jax.jit
    def excess(params: Any, key: jax.Array) -> jax.Array:
        """Bound minus the nats that the chain itself gives the rows, for fresh rows."""
        x_0 = chain_rows(jax.random.fold_in(key, 1), 2048, length)
        noised = objective.corrupt(x_0, key)
        logits = objective.logits(nnx.merge(graphdef, params), x_0, noised)
        return (objective.row_nats(logits, x_0, noised).bound + chain_log_p(x_0)).mean()

    params = train(init_state(config, nnx.to_pure_dict(params), optimizer), jax.random.key(0))["model_state"]
    means = np.array([excess(params, key) for key in jax.random.split(jax.random.key(1), 16)])
    entropy = -float(jnp.mean(chain_log_p(chain_rows(jax.random.key(2), 20_000, length))))
    error = means.std(ddof=1) / 4
    assert -3 * error < means.mean() < 0.02 * entropy
    assert error < 0.005 * entropy
