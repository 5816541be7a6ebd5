"""Speed, on synthetic tokens: what anyone can measure on a machine without data.

    nanodlm bench train demo       # updates; with --baseline beside those of the plain recipe
    nanodlm bench sample demo      # drawing texts
    nanodlm bench loader demo      # reading training rows from disk

FLOP/s are those of a formula, `flops_per_token`, divided by measured seconds. The formula counts products of matrices,
two operations for each multiplication, and of those only the ones that a program cannot do without: no recomputation,
no lookups in the embedding, no norms, nothing that a mask hides. MFU is FLOP/s over the device's peak (`peak_flops`).
"""

import resource
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
import tiktoken
from flax import nnx
from jaxtyping import Array, Key

from nanodlm.bench.flops import _sampling_work, flops_per_update, peak_flops, precision, synthetic_encoding, vocab_size
from nanodlm.build import make_model
from nanodlm.config import Config
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.devices.hosts import put_rows
from nanodlm.devices.mesh import bytes_per_device, make_mesh
from nanodlm.errors import UsageError
from nanodlm.generation.generate import make_draw
from nanodlm.training.plain import init_state, make_network, plain_step
from nanodlm.training.step import compile_step, make_program


def peak_memory() -> dict[str, Any]:
    """`peak_bytes` since the process began, and `peak_bytes_of`: the first `device`, or where that does not say, the
    whole `process`.

    >>> peak_memory()["peak_bytes"] > 1e6
    True
    """
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return {"peak_bytes": stats["peak_bytes_in_use"], "peak_bytes_of": "device"}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "peak_bytes_of": "process"}


def report(
    config: Config,
    *,
    tokens: int,
    flops: float | None,
    seconds: float,
    steps: int | None,
    compile_seconds: float,
    devices: int = 1,
) -> dict[str, Any]:
    """The numbers that `train` and `sample` share.

    Args:
        config: What was measured.
        tokens: Tokens in `seconds`.
        flops: FLOPs in `seconds` over all devices, if known.
        seconds: Median time of a repeat.
        steps: Steps in `seconds`, if known.
        compile_seconds: Time of tracing and compiling.
        devices: How many took part.

    Returns:
        `tokens_per_second`, `step_seconds`, `flops_per_second`, `mfu` (None where the peak is unknown), `peak_bytes`,
        `peak_bytes_of`, `compile_seconds`, `precision`, `device`, `devices`.
    """
    kind = jax.devices()[0].device_kind
    peak = peak_flops(kind, precision(config))
    return {
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds / steps if steps else None,
        "flops_per_second": flops / seconds if flops else None,
        "mfu": flops / seconds / (peak * devices) if flops and peak else None,
        **peak_memory(),
        "compile_seconds": compile_seconds,
        "precision": precision(config),
        "device": kind,
        "devices": devices,
    }


def train(
    config: Config, *, steps: int = 10, baseline: bool = False, emit: Callable[..., None] = lambda *_, **__: None
) -> dict[str, Any]:
    """Time updates on random tokens, on all devices, in the training program itself.

    Args:
        config: What to train.
        steps: Updates to time; the first, before them, is not.
        baseline: Whether to time as many updates of `plain.plain_step`, in turn with ours: same sizes, float32, every
            logit computed, on one device.
        emit: Called as `emit(kind, **fields)` with progress.

    Returns:
        The fields of `report`, of the median update, and `parameters`, `state_bytes` (of one device's parameters,
        optimizer and average), and what the compiler says: `temporary_bytes`, `hlo_flops` and `hlo_bytes`, of which
        those in a loop count once. With a baseline also `baseline_step_seconds` and the like, and `speedup`, the ratio
        of the two medians.

    Raises:
        UsageError: When there is nothing to repeat, or devices cannot share the work.

    Example:
        train(nanodlm.PRESETS["demo"])["tokens_per_second"]
    """
    if steps < 1:
        raise UsageError(f"nothing is measured in {steps} updates: raise --steps")
    encoding, size = synthetic_encoding(config), config.train
    mesh = make_mesh(size.batch_size, fsdp=size.fsdp, tensor=size.tensor)
    began = time.perf_counter()
    program = make_program(config, Vocabulary.of(encoding), mesh)
    compiled = compile_step(config, program, mesh)
    compile_seconds = time.perf_counter() - began
    shape = (size.grad_acc_steps, size.batch_size, config.model.seq_len)
    tokens = np.random.default_rng(0).integers(0, encoding.n_vocab, shape, np.int32)
    key = jax.random.key(size.seed)
    with jax.set_mesh(mesh):
        state = program.initialise()
    state_bytes = bytes_per_device(state)

    def ours() -> None:
        nonlocal state
        state, scalars = compiled(state, put_rows(mesh, tokens, axis=1), key)
        jax.block_until_ready(scalars)

    timed: list[tuple[Callable[[], None], list[float]]] = [(ours, [])]
    plan = _planned(compiled)
    if baseline:
        run, theirs = _baseline(config, encoding, tokens.reshape(1, -1, shape[-1]), key)
        timed.append((run, []))
        plan |= {f"baseline_{name}": value for name, value in theirs.items()}
    for step in range(steps + 1):
        for run, seconds in timed:
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
        emit("progress", done=step, total=steps, unit="updates")
    medians = [median(seconds[1:]) for _, seconds in timed]
    return {
        **report(
            config,
            tokens=tokens.size,
            flops=flops_per_update(config),
            seconds=medians[0],
            steps=1,
            compile_seconds=compile_seconds,
            devices=mesh.size,
        ),
        "parameters": program.n_parameters,
        "state_bytes": state_bytes,
        **plan,
        **({"baseline_step_seconds": medians[1], "speedup": medians[1] / medians[0]} if baseline else {}),
    }


def _baseline(
    config: Config, encoding: tiktoken.Encoding, tokens: np.ndarray, key: Key[Array, ""]
) -> tuple[Callable[[], None], dict[str, Any]]:
    """An update of the plain recipe at a configuration's sizes, and what the compiler says of it."""
    shape = config.model.model_dump(include={"n_layers", "n_heads", "d_model", "d_ff"})
    graphdef, params = nnx.split(make_network(vocab_size(config), **shape))
    step = jax.jit(partial(plain_step, graphdef=graphdef, mask_id=Vocabulary.of(encoding).mask_id), donate_argnums=0)
    state = init_state(nnx.to_pure_dict(params))
    compiled = step.lower(state, tokens, key).compile()

    def run() -> None:
        nonlocal state
        state, scalars = compiled(state, tokens, key)
        jax.block_until_ready(scalars)

    return run, _planned(compiled)


def _planned(compiled: jax.stages.Compiled) -> dict[str, Any]:
    """What the compiler says of one device's program; what stands in a loop is counted once."""
    cost = compiled.cost_analysis() or {}
    return {
        "temporary_bytes": getattr(compiled.memory_analysis(), "temp_size_in_bytes", None),
        "hlo_flops": cost.get("flops"),
        "hlo_bytes": cost.get("bytes accessed"),
    }


def sample(config: Config, *, repeats: int = 5, emit: Callable[..., None] = lambda *_, **__: None) -> dict[str, Any]:
    """Time the configured sampler with a freshly initialised network, on one device.

    Returns:
        The fields of `report`, of the median over `repeats` draws of `sample.num_samples` texts, and `sample_tokens`,
        `steps`. A step is one call of the network on all texts, of each block when there are blocks. Samplers that
        stop when all is written take as many steps as the network's certainty lets them, which a network without
        training says nothing about: their `steps`, and what is derived from them, are None.

    Raises:
        UsageError: When there is nothing to repeat, or the prompt leaves no room to write.

    Example:
        sample(nanodlm.PRESETS["demo"])["step_seconds"]
    """
    if repeats < 1:
        raise UsageError(f"nothing is measured in {repeats} repeats: raise --repeats")
    encoding = synthetic_encoding(config)
    graphdef, params = nnx.split(make_model(config, Vocabulary.of(encoding)))
    began = time.perf_counter()
    draw = make_draw(config.sample, config, encoding, graphdef)
    key = jax.random.key(config.sample.seed)
    compiled = draw.lower(params, key).compile()
    compile_seconds = time.perf_counter() - began
    seconds = []
    for repeat in range(repeats + 1):  # the first is not counted
        began = time.perf_counter()
        jax.block_until_ready(compiled(params, jax.random.fold_in(key, repeat)))
        seconds.append(time.perf_counter() - began)
        emit("progress", done=repeat, total=repeats, unit="draws")
    tokens = config.sample.num_samples * (config.sample.length or config.model.seq_len)
    steps, flops = _sampling_work(config, len(encoding.encode_ordinary(config.sample.prompt)))
    measured = report(
        config,
        tokens=tokens,
        flops=flops,
        seconds=median(seconds[1:]),
        steps=steps,
        compile_seconds=compile_seconds,
    )
    return {**measured, "sample_tokens": tokens, "steps": steps}


def loader(
    config: Config,
    *,
    batches: int = 200,
    rows: int = 8192,
    against: float | None = None,
    emit: Callable[..., None] = lambda *_, **__: None,
) -> dict[str, Any]:
    """Time reading training rows: shards of random rows in a temporary folder, through `loader.train_batches`.

    Args:
        config: Gives the rows' length and token type, and the rows of an update.
        batches: Batches to time, after as many as the loader may have prepared in advance.
        rows: Rows on disk, in four shards, or those of one batch when that is more.
        against: Tokens per second that a trainer takes, to compare with.
        emit: Called as `emit(kind, **fields)` with progress.

    Returns:
        `tokens_per_second`, `batch_seconds` and `first_batch_seconds`, `batch_tokens`, `multiple` (of `against`; None
        without).

    Raises:
        UsageError: When there is nothing to measure.

    Example:
        loader(nanodlm.PRESETS["demo"], against=200_000)["multiple"]
    """
    if batches < 1:
        raise UsageError(f"nothing is measured in {batches} batches: raise --batches")
    if against is not None and against <= 0:
        raise UsageError(f"--against is a speed in tokens per second, above 0, not {against}")
    from nanodlm.data import rows as data_rows
    from nanodlm.data.loader import train_batches
    from nanodlm.data.rows import dtype_for, write

    n_vocab, length = synthetic_encoding(config).n_vocab, config.model.seq_len
    per_step = config.train.batch_size * config.train.grad_acc_steps
    dtype = dtype_for(n_vocab + 1)
    ahead = 32  # twice what the loader prepares
    with tempfile.TemporaryDirectory() as folder:
        tokens = np.random.default_rng(0).integers(0, n_vocab, (max(rows, per_step), length))
        parts = np.array_split(tokens.astype(dtype), 4)
        for i, part in enumerate(parts):
            write(Path(folder) / data_rows.name(i), part)
        began = time.perf_counter()
        size = {"batch_size": config.train.batch_size, "grad_acc_steps": config.train.grad_acc_steps}
        counts, seed = [len(part) for part in parts], config.data.shuffle_seed
        stream = train_batches(counts, Path(folder).joinpath, dtype=dtype, **size, seed=seed)
        next(stream)
        first = time.perf_counter() - began
        for _ in range(ahead):
            next(stream)
        began = time.perf_counter()
        for i in range(batches):
            next(stream)
            emit("progress", done=i + 1, total=batches, unit="batches")
        seconds = time.perf_counter() - began
        del stream  # before the files go
    speed = batches * per_step * length / seconds
    return {
        "tokens_per_second": speed,
        "batch_seconds": seconds / batches,
        "first_batch_seconds": first,
        "batch_tokens": per_step * length,
        "multiple": speed / against if against else None,
    }
