"""Speed on synthetic tokens: what anyone can measure on a machine without data.

    nanodlm bench train demo       # updates; with --baseline beside those of the plain recipe
    nanodlm bench sample demo      # drawing texts
    nanodlm bench loader demo      # reading training rows from disk

FLOP/s are those of the formula in `nanodlm.bench.flops`, divided by measured seconds.
"""

import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from nanodlm.bench.flops import flops_per_update, peak_flops, precision, sampling_work, synthetic_encoding, vocab_size
from nanodlm.build import make_model
from nanodlm.config import Config
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.devices.hosts import put_rows
from nanodlm.diffusion.plain import plain_nelbo
from nanodlm.errors import Emit, UsageError, silent
from nanodlm.generation.generate import make_draw
from nanodlm.model.transformer import Transformer
from nanodlm.training.step import make_program

ADAMW = optax.adamw(3e-4, b2=0.95, weight_decay=0.1)


def report(
    config: Config, *, tokens: int, flops: float | None, seconds: float, steps: int | None, devices: int = 1
) -> dict[str, Any]:
    """Put together the numbers that `train` and `sample` share; `tokens`, `flops` and `steps` are those in `seconds`.

    `mfu` is FLOP/s over the peak of all devices, None where the peak is unknown. `peak_bytes` are those since the
    process began, of the first device or, where that does not tell, of the whole process: `peak_bytes_of` says which.
    """
    device = jax.devices()[0]
    peak = peak_flops(device.device_kind, precision(config))
    on_device = (device.memory_stats() or {}).get("peak_bytes_in_use")
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds / steps if steps else None,
        "flops_per_second": flops / seconds if flops else None,
        "mfu": flops / seconds / (peak * devices) if flops and peak else None,
        "peak_bytes": on_device or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "peak_bytes_of": "device" if on_device else "process",
        "precision": precision(config),
        "device": device.device_kind,
        "devices": devices,
    }


def _medians(calls: list[Callable[[], Any]], repeats: int, unit: str, emit: Emit) -> list[float]:
    """Return the median seconds of each call; they take turns, and the first turn is not counted."""
    seconds: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats + 1):
        for call, taken in zip(calls, seconds, strict=True):
            began = time.perf_counter()
            jax.block_until_ready(call())
            taken.append(time.perf_counter() - began)
        emit("progress", done=repeat, total=repeats, unit=unit)
    return [median(taken[1:]) for taken in seconds]


def _updates(step: Callable[[Any], tuple[Any, Any]], state: Any) -> Iterator[Any]:
    """Do one update after the other, each from where the last one ended, and yield its scalars."""
    while True:
        state, scalars = step(state)
        yield scalars


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


def train(config: Config, *, steps: int = 10, baseline: bool = False, emit: Emit = silent) -> dict[str, Any]:
    """Time updates on random tokens, on all devices, in the training program itself.

    The fields of `report` are those of the median update. With `baseline`, plain updates of a usual network of the same
    sizes, on one device, are timed in turn with these, and `speedup` is the ratio of the two medians.
    """
    if steps < 1:
        raise UsageError(f"nothing is measured in {steps} updates: raise --steps")
    encoding, seed, began = synthetic_encoding(config), config.train.seed, time.perf_counter()
    program = make_program(config, Vocabulary.of(encoding))
    compiled = program.compile(seed)
    compile_seconds = time.perf_counter() - began
    mesh, key = program.mesh, jax.random.key(seed)
    tokens = np.random.default_rng(0).integers(0, encoding.n_vocab, program.rows.shape, np.int32)
    with jax.set_mesh(mesh):
        start = program.initialise()
    calls = [_updates(lambda state: compiled(state, put_rows(mesh, tokens), key), start).__next__]
    if baseline:
        sizes = config.model.model_dump(include={"n_layers", "n_heads", "d_model", "d_ff"})
        network = Transformer(vocab_size=vocab_size(config), **sizes, qk_norm=False, zero_init=False, rngs=nnx.Rngs(0))
        graphdef, params = nnx.split(network)
        step = jax.jit(partial(plain_step, graphdef=graphdef, mask_id=encoding.n_vocab), donate_argnums=0)
        rows, params = tokens.reshape(-1, config.model.seq_len), nnx.to_pure_dict(params)
        start = (params, ADAMW.init(params))
        calls.append(_updates(lambda state: step(state, rows, key), start).__next__)
    seconds = _medians(calls, steps, "updates", emit)
    flops = flops_per_update(config)
    return {
        **report(config, tokens=tokens.size, flops=flops, seconds=seconds[0], steps=1, devices=mesh.size),
        "compile_seconds": compile_seconds,
        "parameters": program.n_parameters,
        **({"baseline_step_seconds": seconds[1], "speedup": seconds[1] / seconds[0]} if baseline else {}),
    }


def sample(config: Config, *, repeats: int = 5, emit: Emit = silent) -> dict[str, Any]:
    """Time the configured sampler with a freshly initialised network, on one device.

    The fields of `report` are those of the median draw of `sample.num_samples` texts. A step is one call of the network
    on all texts, of each block when there are blocks. Some samplers take steps by the text: theirs are None.
    """
    if repeats < 1:
        raise UsageError(f"nothing is measured in {repeats} repeats: raise --repeats")
    encoding = synthetic_encoding(config)
    model, key = make_model(config, Vocabulary.of(encoding)), jax.random.key(config.sample.seed)
    params, began = nnx.state(model), time.perf_counter()
    compiled = make_draw(config.sample, encoding, model, model.objective.schedule).lower(params, key).compile()
    compile_seconds = time.perf_counter() - began
    (seconds,) = _medians([lambda: compiled(params, key)], repeats, "draws", emit)
    tokens = config.sample.num_samples * (config.sample.length or config.model.seq_len)
    steps, flops = sampling_work(config, len(encoding.encode_ordinary(config.sample.prompt)))
    result = report(config, tokens=tokens, flops=flops, seconds=seconds, steps=steps)
    return {**result, "compile_seconds": compile_seconds, "sample_tokens": tokens, "steps": steps}


def loader(config: Config, *, batches: int = 2000, against: float | None = None, emit: Emit = silent) -> dict[str, Any]:
    """Time reading updates' rows: 16 shards of random rows in a temporary folder, through `loader.train_batches`.

    `tokens_per_second_per_core` counts the CPU time of all threads. `multiple` is the speed over `against`, the tokens
    per second that a trainer takes, or None without.
    """
    if batches < 1:
        raise UsageError(f"nothing is measured in {batches} batches: raise --batches")
    if against is not None and against <= 0:
        raise UsageError(f"--against is a speed in tokens per second, above 0, not {against}")
    from nanodlm.data import rows  # neither Grain nor ArrayRecord is there where only a device is measured
    from nanodlm.data.loader import AHEAD, TOGETHER, train_batches

    n_vocab, length = synthetic_encoding(config).n_vocab, config.model.seq_len
    per_update = config.train.batch_size * config.train.grad_acc_steps
    dtype = rows.dtype_for(n_vocab + 1)
    tokens = np.random.default_rng(0).integers(0, n_vocab, (max(8192, per_update), length)).astype(dtype)
    with tempfile.TemporaryDirectory() as folder:
        shards = np.array_split(tokens, 16)
        for i, shard in enumerate(shards):
            rows.write(Path(folder) / rows.name(i), shard)
        stream = train_batches(config, {"rows_per_shard": [*map(len, shards)], "dtype": dtype}, Path(folder))
        for _ in range(2 * (AHEAD + 1) * (1 + TOGETHER // per_update)):  # twice what is read in advance
            next(stream)
        began, cpu_began = time.perf_counter(), time.process_time()
        for i in range(batches):
            next(stream)
            emit("progress", done=i + 1, total=batches, unit="batches")
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
        del stream  # before the files go
    speed = batches * per_update * length / seconds
    return {
        "tokens_per_second": speed,
        "tokens_per_second_per_core": batches * per_update * length / cpu_seconds,
        "batch_seconds": seconds / batches,
        "batch_tokens": per_update * length,
        "multiple": speed / against if against else None,
    }
