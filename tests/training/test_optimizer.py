"""The learning rate and the optimizers, against their formulas."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from nanodlm.build import make_model
from nanodlm.config import PRESETS, TrainConfig
from nanodlm.data.tokenizer import plain_bytes
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.training.optimizer import is_matrix, learning_rate, make_optimizer

ENCODING = plain_bytes()
MASK_ID = ENCODING.n_vocab
MODEL = {"seq_len": 8, "n_layers": 1, "n_heads": 2, "d_model": 8, "d_ff": 12, "conv_width": 3, "tie_embeddings": False}
OBJECTIVE = {"estimator": "continuous", "weighting": "bound"}
TINY = PRESETS["demo"].replace(data={"tokenizer": "bytes"}, model=MODEL, objective=OBJECTIVE)
BLOCK_MATRICES = {"qkv", "attention_out", "mlp_in", "mlp_out", "modulation"}


def rates(steps: list[int], **fields: Any) -> list[float]:
    schedule = learning_rate(TrainConfig(**{"lr": 2.0, "min_lr": 0.5, "max_steps": 110, "warmup_steps": 10, **fields}))
    return [float(schedule(step)) for step in steps]


QUARTER = 0.5 + 1.5 * (1 + np.cos(np.pi / 4)) / 2
DECAY = {"lr_schedule": "warmup_stable_decay"}
SHORT = {"min_lr": 0.0, "warmup_steps": 2, "max_steps": 6}  # the rise first, then what is left of the decay


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"lr_schedule": "warmup_cosine"}, {0: 0.2, 9: 2.0, 10: 2.0, 60: 1.25, 35: QUARTER, 110: 0.5, 500: 0.5}),
        ({**DECAY, "cooldown_steps": 40}, {0: 0.2, 9: 2.0, 10: 2.0, 70: 2.0, 80: 1.625, 90: 1.25, 110: 0.5, 500: 0.5}),
        ({**DECAY, "cooldown_steps": 100}, {0: 0.2, 9: 2.0, 10: 2.0, 60: 1.25, 110: 0.5}),
        ({**DECAY, **SHORT, "cooldown_steps": 100}, {0: 1.0, 1: 2.0, 2: 2.0, 3: 1.5, 4: 1.0, 5: 0.5}),
        ({"lr_schedule": "warmup_constant"}, {0: 0.2, 4: 1.0, 9: 2.0, 10: 2.0, 60: 2.0, 110: 2.0}),
        ({"lr_schedule": "none"}, {0: 2.0, 5: 2.0, 110: 2.0}),
    ],
)
def test_every_schedule_has_the_rates_of_its_formula(fields: dict[str, Any], expected: dict[int, float]) -> None:
    assert rates(list(expected), **fields) == pytest.approx(list(expected.values()), rel=1e-5)


@pytest.mark.parametrize("kind", ["warmup_cosine", "warmup_stable_decay", "warmup_constant"])
@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_without_a_warmup_the_first_update_has_the_full_rate(kind: str, warmup_steps: int) -> None:
    assert rates([0], lr_schedule=kind, warmup_steps=warmup_steps) == pytest.approx([2.0])


@cache
def fresh(**model: Any) -> tuple[nnx.GraphDef, Any]:
    """Structure of a tiny network, and parameters that are all different from zero."""
    config = TINY.replace(model=model)
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make_model(config, Vocabulary.of(ENCODING))))
    rng = np.random.default_rng(1)

    def drawn(leaf: Any) -> jax.Array:
        return jnp.asarray(rng.normal(scale=0.3, size=leaf.shape) + (leaf.ndim == 1), leaf.dtype)

    return graphdef, jax.tree.map(drawn, nnx.to_pure_dict(abstract))


def gradients_like(params: Any, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params)


def updates(optimizer: optax.GradientTransformation, params: Any, *gradients: Any) -> dict[str, np.ndarray]:
    """The last of several updates, by the parameters' paths."""
    state, advance = jax.jit(optimizer.init)(params), jax.jit(optimizer.update)
    for gradient in gradients:
        update, state = advance(gradient, state, params)
    return by_name(update)


def by_name(tree: Any) -> dict[str, np.ndarray]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in flat}


def assert_trees_close(left: Any, right: Any, **tolerance: float) -> None:
    right = by_name(right)
    for name, value in by_name(left).items():
        np.testing.assert_allclose(value, right[name], **tolerance, err_msg=name)


def in_block(name: str) -> bool:
    return name.startswith("blocks/") and name.split("/")[-2] in BLOCK_MATRICES


def steady(**fields: Any) -> TrainConfig:
    return TrainConfig(**{"lr": 0.1, "lr_schedule": "none", "clip_grad_norm": 0.0, "weight_decay": 0.0, **fields})


@pytest.mark.parametrize(("optimizer", "rate"), [("adamw", 0.1), ("muon", 0.03)])
def test_weight_decay_acts_on_matrices_alone_at_the_rate_of_their_optimizer(optimizer: str, rate: float) -> None:
    _, params = fresh(time_conditioning=True)
    zero = jax.tree.map(jnp.zeros_like, params)
    decayed = updates(make_optimizer(steady(optimizer=optimizer, weight_decay=0.2, muon_lr=0.03)), params, zero)
    before = by_name(params)
    linear = {name for name in before if in_block(name)} | {"head/embedding", "time_in/kernel"}
    assert {name for name, chosen in by_name(is_matrix(params)).items() if chosen} == linear
    assert len(linear) == 7
    for name, update in decayed.items():
        matrix = in_block(name) if optimizer == "muon" else name in linear
        expected = -rate * 0.2 * before[name] if matrix else np.zeros_like(update)
        np.testing.assert_allclose(update, expected, rtol=1e-5, err_msg=name)


def test_adamw_follows_its_formula() -> None:
    _, params = fresh()
    first, second = gradients_like(params, 0), gradients_like(params, 1)
    train = steady(optimizer="adamw", beta1=0.8, beta2=0.95, eps=1e-3)
    moved = updates(make_optimizer(train), params, first, second)
    for name, update in moved.items():
        g, h = by_name(first)[name].astype(np.float64), by_name(second)[name].astype(np.float64)
        mean = (0.2 * 0.8 * g + 0.2 * h) / (1 - 0.8**2)
        square = (0.05 * 0.95 * g**2 + 0.05 * h**2) / (1 - 0.95**2)
        np.testing.assert_allclose(update, -0.1 * mean / (np.sqrt(square) + 1e-3), rtol=1e-3, atol=1e-5, err_msg=name)


def test_muon_takes_the_matrices_of_blocks_and_leaves_the_rest_to_adamw() -> None:
    _, params = fresh(time_conditioning=True)
    history = [gradients_like(params, seed) for seed in range(3)]
    train = steady(optimizer="muon", beta1=0.8, beta2=0.95, eps=1e-3)
    moved = updates(make_optimizer(train), params, *history)
    # Optax's Muon gives its AdamW Nesterov's look-ahead.
    adamw = optax.adamw(train.lr, b1=0.8, b2=0.95, eps=1e-3, weight_decay=0.0, nesterov=True)
    reference = updates(adamw, params, *history)
    others = {name for name in moved if not in_block(name)}
    assert {"embedding/embedding", "head/embedding", "time_in/kernel", "blocks/conv/kernel"} < others
    for name, update in moved.items():
        if name in others:
            np.testing.assert_allclose(update, reference[name], rtol=1e-4, atol=1e-7, err_msg=name)
        else:
            assert not np.allclose(update, reference[name], rtol=0.1), name


def test_muons_updates_are_nearly_orthogonal_and_ignore_the_gradients_scale() -> None:
    _, params = fresh()
    gradient = gradients_like(params)
    optimizer = make_optimizer(steady(optimizer="muon", muon_lr=0.03))
    moved = updates(optimizer, params, gradient)
    scaled = updates(optimizer, params, jax.tree.map(lambda g: 1000 * g, gradient))
    blocks = {name for name in moved if in_block(name)}
    assert len(blocks) == 4
    for name in blocks:
        *_, fan_in, fan_out = moved[name].shape
        of_layers = np.linalg.svd(moved[name], compute_uv=False) / (0.03 * np.sqrt(max(1, fan_out / fan_in)))
        for singular, before in zip(of_layers, np.linalg.svd(by_name(gradient)[name], compute_uv=False), strict=True):
            assert singular.max() < 1.3, name
            assert singular.max() / singular.min() < before.max() / before.min(), name
        np.testing.assert_allclose(scaled[name], moved[name], rtol=1e-3, atol=1e-6, err_msg=name)


def test_muons_rate_has_the_shape_of_adamws() -> None:
    _, params = fresh()
    gradient = gradients_like(params)
    train = {"optimizer": "muon", "lr_schedule": "warmup_constant", "max_steps": 20, "muon_lr": 0.03}
    slow, full = (updates(make_optimizer(steady(**train, warmup_steps=n)), params, gradient) for n in (10, 0))
    for name, update in slow.items():
        np.testing.assert_allclose(10 * update, full[name], rtol=1e-3, atol=1e-6, err_msg=name)


def test_clipping_bounds_the_update_and_spares_small_gradients() -> None:
    _, params = fresh()
    gradient = jax.tree.map(lambda g: 100 * g, gradients_like(params))
    small = jax.tree.map(lambda g: 1e-5 * g, gradient)
    # With eps far above the gradients, an AdamW update is lr / eps times the gradient.
    clipped, free = (make_optimizer(steady(optimizer="adamw", eps=1e3, clip_grad_norm=c)) for c in (0.5, 0.0))
    norm = float(optax.tree.norm(updates(clipped, params, gradient)))
    assert norm == pytest.approx(0.1 / 1e3 * 0.5, rel=1e-2)
    assert float(optax.tree.norm(updates(free, params, gradient))) > 100 * norm
    assert_trees_close(updates(clipped, params, small), updates(free, params, small), rtol=1e-6)
