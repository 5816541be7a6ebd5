"""Speed on synthetic tokens: what anyone can measure on a machine without data.

    nanodlm bench train demo       # updates
    nanodlm bench sample demo      # drawing texts
    nanodlm bench loader demo      # reading training rows from disk

FLOP/s are those of the formula in `nanodlm.bench.flops`, divided by measured seconds.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
from flax import nnx

from nanodlm.bench.flops import flops_per_update, peak_flops, precision, synthetic_encoding
from nanodlm.bench.memory import peak_memory
from nanodlm.build import make_model
from nanodlm.config import Config
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.errors import Emit, silent
from nanodlm.generation.generate import make_draw
from nanodlm.training.step import make_program


def report(config: Config, *, tokens: int, seconds: float, devices: int = 1) -> dict[str, Any]:
    """Put together the numbers that `train` and `sample` share: `tokens` took `seconds`, memory is the most so far."""
    device = jax.devices()[0]
    on_device = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "tokens_per_second": tokens / seconds,
        "peak_bytes": on_device or peak_memory(),
        "peak_bytes_of": "device" if on_device else "process",
        "precision": precision(config),
        "device": device.device_kind,
        "devices": devices,
    }


def _median(call: Callable[[], Any], repeats: int, unit: str, emit: Emit) -> float:
    """Return the median seconds of a call, of which the first one is not counted."""
    seconds = []
    for repeat in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - began)
        emit("progress", done=repeat, total=repeats, unit=unit)
    return median(seconds[1:])


def train(config: Config, *, steps: int = 10, emit: Emit = silent) -> dict[str, Any]:
    """Time the median update on random tokens, on all devices, in the training program itself."""
    encoding, seed, began = synthetic_encoding(config), config.train.seed, time.perf_counter()
    program = make_program(config, Vocabulary.of(encoding))
    compiled = program.compile(seed)
    compile_seconds = time.perf_counter() - began
    mesh, key = program.mesh, jax.random.key(seed)
    tokens = np.random.default_rng(0).integers(0, encoding.n_vocab, program.rows.shape, np.int32)
    with jax.set_mesh(mesh):
        state = program.initialise()

    def update() -> Any:
        nonlocal state
        state, scalars = compiled(state, jax.device_put(tokens, program.rows.sharding), key)
        return scalars

    seconds = _median(update, steps, "updates", emit)
    flops = flops_per_update(config) / seconds
    peak = peak_flops(jax.devices()[0].device_kind, precision(config))
    return {
        **report(config, tokens=tokens.size, seconds=seconds, devices=mesh.size),
        "step_seconds": seconds,
        "flops_per_second": flops,
        "mfu": flops / (peak * mesh.size) if peak else None,  # of unknown devices
        "compile_seconds": compile_seconds,
        "parameters": program.n_parameters,
    }


def sample(config: Config, *, repeats: int = 5, emit: Emit = silent) -> dict[str, Any]:
    """Time the median draw of the configured texts with a freshly initialised network, on one device."""
    encoding = synthetic_encoding(config)
    model, key = make_model(config, Vocabulary.of(encoding)), jax.random.key(config.sample.seed)
    params, began = nnx.state(model), time.perf_counter()
    compiled = make_draw(config.sample, encoding, model, model.objective.schedule).lower(params, key).compile()
    compile_seconds = time.perf_counter() - began
    seconds = _median(lambda: compiled(params, key), repeats, "draws", emit)
    tokens = config.sample.num_samples * (config.sample.length or config.model.seq_len)
    return {
        **report(config, tokens=tokens, seconds=seconds),
        "draw_seconds": seconds,
        "compile_seconds": compile_seconds,
        "sample_tokens": tokens,
    }


def loader(config: Config, *, batches: int = 2000, emit: Emit = silent) -> dict[str, Any]:
    """Time reading updates' rows: 16 shards of random rows in a temporary folder, through `loader.train_batches`."""
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
    return {
        "tokens_per_second": batches * per_update * length / seconds,
        "tokens_per_second_per_core": batches * per_update * length / cpu_seconds,  # of all threads
        "batch_seconds": seconds / batches,
        "batch_tokens": per_update * length,
    }
