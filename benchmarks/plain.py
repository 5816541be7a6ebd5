"""Time updates of the training program in turn with those of a first version of a trainer, of the same sizes.

    python -m benchmarks.plain --steps 6 --data.tokenizer gpt2

The plain step is AdamW in float32 on one device, with every logit computed and stored, of a usual network with the same
layers, heads and widths. Both take the same random tokens.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Annotated, Any

import jax
import numpy as np
import optax
import tyro
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from nanodlm.bench.flops import synthetic_encoding
from nanodlm.config import PRESETS, Config
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.diffusion.plain import plain_nelbo
from nanodlm.model.transformer import Transformer
from nanodlm.precision import measured
from nanodlm.training.step import make_program

ADAMW = optax.adamw(3e-4, b2=0.95, weight_decay=0.1)


def plain_step(
    state: tuple[Any, Any], x_0: Int[Array, "B L"], key: Key[Array, ""], *, graphdef: nnx.GraphDef, mask_id: int
) -> tuple[tuple[Any, Any], Float[Array, ""]]:
    """Take one update as a first version of a trainer does: AdamW, float32, and every logit computed and stored."""
    params, moments = state

    def loss_fn(params: Any) -> Float[Array, ""]:
        return plain_nelbo(nnx.merge(graphdef, params), x_0, key, mask_id=mask_id).mean() / x_0.shape[1]

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, moments = ADAMW.update(grads, moments, params)
    return (optax.apply_updates(params, updates), moments), loss


def plain(config: Annotated[Config, tyro.conf.arg(name="")] = PRESETS["demo"], steps: int = 10) -> dict[str, Any]:
    """Time updates of both, in turn, the first of each not counted.

    Args:
        config: Sizes, batch and recipe of ours; the plain step takes the sizes and the batch.
        steps: Updates of each to time.

    Returns:
        `step_seconds` and `plain_step_seconds`, the medians, and `speedup`, the ratio of the two.
    """
    config = measured(config)
    encoding = synthetic_encoding(config)
    vocabulary, key = Vocabulary.of(encoding), jax.random.key(config.train.seed)
    program = make_program(config, vocabulary)
    compiled = program.compile(config.train.seed)
    tokens = np.random.default_rng(0).integers(0, encoding.n_vocab, program.rows.shape, np.int32)
    with jax.set_mesh(program.mesh):
        start = program.initialise()
    ours = _updates(lambda state: compiled(state, jax.device_put(tokens, program.rows.sharding), key), start)

    sizes = config.model.model_dump(include={"n_layers", "n_heads", "d_model", "d_ff"})
    usual = {**sizes, "qk_norm": False, "zero_init": False}
    graphdef, params = nnx.split(Transformer(vocab_size=vocabulary.padded_size, **usual, rngs=nnx.Rngs(0)))
    step = jax.jit(partial(plain_step, graphdef=graphdef, mask_id=vocabulary.mask_id), donate_argnums=0)
    rows, params = tokens.reshape(-1, config.model.seq_len), nnx.to_pure_dict(params)
    theirs = _updates(lambda state: step(state, rows, key), (params, ADAMW.init(params)))

    seconds: dict[str, list[float]] = {"step_seconds": [], "plain_step_seconds": []}
    for _ in range(steps + 1):
        for updates, taken in zip((ours, theirs), seconds.values(), strict=True):
            began = time.perf_counter()
            jax.block_until_ready(next(updates))
            taken.append(time.perf_counter() - began)
    found = {name: median(taken[1:]) for name, taken in seconds.items()}
    found["speedup"] = found["plain_step_seconds"] / found["step_seconds"]
    for name, value in found.items():
        print(f"{name:<20} {value:,.6g}")
    return found


def _updates(step: Callable[[Any], tuple[Any, Any]], state: Any) -> Iterator[Any]:
    """Do one update after the other, each from where the last one ended, and yield its scalars."""
    while True:
        state, scalars = step(state)
        yield scalars


if __name__ == "__main__":
    tyro.cli(plain, use_underscores=True)
