"""Speed, on synthetic tokens: what anyone can measure on a machine without data.

    nanodlm bench train demo       # updates; with --baseline beside those of the plain recipe
    nanodlm bench sample demo      # drawing texts
    nanodlm bench loader demo      # reading training rows from disk

FLOP/s are those of a formula, `flops_per_token`, divided by measured seconds. The formula counts products of matrices,
two operations for each multiplication, and of those only the ones that a program cannot do without: no recomputation,
no lookups in the embedding, no norms, nothing that a mask hides. MFU is FLOP/s over the device's peak (`peak_flops`).
"""

import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import jax
import numpy as np
import tiktoken
from flax import nnx
from jaxtyping import Array, Key

from nanodlm import generation, plain, sharding, tokenizer
from nanodlm.checkpoint import make_model, make_objective
from nanodlm.config import Config, ModelConfig
from nanodlm.errors import UsageError
from nanodlm.update import compile_step, make_program

Precision = Literal["bfloat16", "tensorfloat32", "float32"]

# Peak FLOP/s of dense products by the makers' data sheets: bfloat16 with float32 sums, TF32, float32. V100 has no TF32
# and float16 in place of bfloat16; TPUs multiply float32 in passes of bfloat16.
PEAKS: dict[str, tuple[float, float | None, float | None]] = {
    r"H100 80GB HBM3|H100 SXM|H200$|GH200": (989.4e12, 494.7e12, 66.9e12),
    r"A100": (312e12, 156e12, 19.5e12),
    r"V100-SXM": (125e12, 15.7e12, 15.7e12),
    r"L4$": (121e12, 60.5e12, 30.3e12),
    r"RTX 4090$": (165.2e12, 82.6e12, 82.6e12),
    r"TPU v4$": (275e12, None, None),
    r"TPU v5 lite|TPU v5e": (197e12, None, None),
    r"TPU v5p?$": (459e12, None, None),
    r"TPU v6 lite|TPU v6e": (918e12, None, None),
}


def peak_flops(device_kind: str, dtype: Precision) -> float | None:
    """Peak FLOP/s of a device, None where it is not known: a part of a GPU, say, or a CPU.

    Args:
        device_kind: As `jax.Device.device_kind` has it.
        dtype: Precision of the products; see `precision`.

    >>> peak_flops("NVIDIA H100 80GB HBM3", "bfloat16")
    989400000000000.0
    >>> peak_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16") is None
    True
    """
    column = ("bfloat16", "tensorfloat32", "float32").index(dtype)
    if "MIG" in device_kind:
        return None
    return next((peaks[column] for name, peaks in PEAKS.items() if re.search(rf"\b({name})", device_kind)), None)


def precision(config: Config) -> Precision:
    """What products are computed in: unless it is told otherwise, JAX multiplies float32 in TF32 on a GPU.

    >>> precision(Config().replace(model={"dtype": "bfloat16"}))
    'bfloat16'
    """
    if config.model.dtype == "bfloat16":
        return "bfloat16"
    by_default: dict[str, Precision] = {"gpu": "tensorfloat32", "tpu": "bfloat16"}
    chosen = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return by_default.get(jax.default_backend(), "float32") if chosen in (None, "default", "fastest") else "float32"


def forward_flops(model: ModelConfig, vocab_size: int, *, keys: float, output_share: float = 1.0) -> float:
    """FLOPs at one position in one pass forward: 2 for each element of a matrix, and attention.

    A block has 4 d_model^2 + 2 d_model d_ff elements. Attention multiplies queries with keys and weights with values:
    4 d_model for each position that is read. Time conditioning, a few products per row, is left out.

    Args:
        model: The network's shape.
        vocab_size: Outputs; see `vocab_size`.
        keys: Positions that a position reads, on average.
        output_share: Share of positions at which the output layer is computed.

    >>> shape = ModelConfig(n_layers=1, d_model=8, d_ff=16, n_heads=2)
    >>> forward_flops(shape, 128, keys=32)  # 2 * 512 + 4 * 8 * 32 + 2 * 8 * 128
    4096.0
    """
    d = model.d_model
    block = 2 * (4 * d * d + 2 * d * model.d_ff) + 4 * d * keys
    return float(model.n_layers * block + 2 * d * vocab_size * output_share)


def flops_per_token(config: Config, vocab_size: int, *, output_share: float = 1.0) -> float:
    """FLOPs of training, per token of a row: 6 for each element of a matrix and 12 n_layers d_model seq_len.

    That is three times a forward pass, for the backward pass has two products for each of the forward one. It is the
    count of PaLM (arXiv:2204.02311, appendix B) and of nanoGPT's `estimate_mfu`, but for what is not needed: embeddings
    are looked up, not multiplied, and masks hide half of the row from an autoregressive network, whose attention PaLM
    counts in full. A block network reads the clean row as well, of which the last layer gives keys and values alone.

    There are two definitions, which differ in the output layer:

        output_share = 1    FLOPs of the model as it is defined, with logits at every position
        output_share < 1    FLOPs that were done, when logits are computed at a share of the positions alone

    An MFU must come from the second: with the first, skipping work would count as doing it. Speed has no such question,
    so compare tokens/s, or step times, between programs that skip different things.

    Args:
        config: Shape and objective.
        vocab_size: Outputs; see `vocab_size`.
        output_share: Share of positions at which the output layer is computed. The count estimators mask
            (seq_len + 1) / 2 positions of a row on average.

    >>> config = Config().replace(model={"n_layers": 1, "d_model": 8, "d_ff": 16, "n_heads": 2, "seq_len": 32})
    >>> flops_per_token(config, 128), flops_per_token(config, 128, output_share=0.5)
    (12288.0, 9216.0)
    """
    model, block_size = config.model, config.objective.block_size
    if config.objective.kind == "block":
        keys = (model.seq_len + block_size) / 2
        context = forward_flops(model, vocab_size, keys=keys, output_share=0)
        unused = forward_flops(model.model_copy(update={"n_layers": 1}), vocab_size, keys=keys, output_share=0)
        context += 2 * 2 * model.d_model**2 - unused
        return 3 * (context + forward_flops(model, vocab_size, keys=keys, output_share=output_share))
    keys = (model.seq_len + 1) / 2 if config.objective.kind == "autoregressive" else model.seq_len
    return 3 * forward_flops(model, vocab_size, keys=keys, output_share=output_share)


def synthetic_encoding(config: Config) -> tiktoken.Encoding:
    """An encoding with as many entries as the configuration's tokenizer; beyond bytes they stand for nothing.

    >>> synthetic_encoding(Config()).n_vocab
    4095
    """
    entries = {"gpt2": 50257, "bytes": 257, "bpe": config.data.vocab_size}[config.data.tokenizer] - 1
    ranks = {bytes([i]) if i < 256 else i.to_bytes(4, "big"): i for i in range(entries)}
    return tokenizer.make_encoding("synthetic", ranks)


def vocab_size(config: Config) -> int:
    """Outputs of a configuration's network: the tokenizer's entries, the mask, and padding.

    >>> vocab_size(Config().replace(data={"tokenizer": "gpt2"}))
    50304
    """
    return tokenizer.padded_vocab_size(synthetic_encoding(config))


def flops_per_update(config: Config) -> float:
    """FLOPs that one update does, over all devices: logits are computed where the objective may score, and only there.

    >>> config = Config().replace(train={"batch_size": 2, "grad_acc_steps": 4})
    >>> flops_per_update(config) == 8 * 64 * flops_per_token(config, vocab_size(config), output_share=65 / 128)
    True
    """
    size, length = config.train, config.model.seq_len
    most = make_objective(config, synthetic_encoding(config)).most_scored(size.batch_size, length)
    per_token = flops_per_token(config, vocab_size(config), output_share=most / (2 * length))
    return size.grad_acc_steps * size.batch_size * length * per_token


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
    mesh = sharding.make_mesh(size.batch_size, fsdp=size.fsdp, tensor=size.tensor)
    began = time.perf_counter()
    program = make_program(config, encoding, mesh)
    compiled = compile_step(config, program, mesh)
    compile_seconds = time.perf_counter() - began
    shape = (size.grad_acc_steps, size.batch_size, config.model.seq_len)
    tokens = np.random.default_rng(0).integers(0, encoding.n_vocab, shape, np.int32)
    key = jax.random.key(size.seed)
    with jax.set_mesh(mesh):
        state = program.initialise()
    state_bytes = sharding.bytes_per_device(state)

    def ours() -> None:
        nonlocal state
        state, scalars = compiled(state, sharding.put_rows(mesh, tokens, axis=1), key)
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
    graphdef, params = nnx.split(plain.make_network(vocab_size(config), **shape))
    step = jax.jit(partial(plain.plain_step, graphdef=graphdef, mask_id=encoding.n_vocab), donate_argnums=0)
    state = plain.init_state(nnx.to_pure_dict(params))
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
    graphdef, params = nnx.split(make_model(config, encoding))
    began = time.perf_counter()
    draw = generation.make_draw(config.sample, config, encoding, graphdef)
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


def _sampling_work(config: Config, prompt: int) -> tuple[int, float] | tuple[None, None]:
    """Steps and FLOPs of drawing all texts behind a prompt of so many tokens, where they do not depend on the texts."""
    options, kind, outputs = config.sample, config.objective.kind, vocab_size(config)
    length = options.length or config.model.seq_len
    size = {"block": config.objective.block_size, "autoregressive": 1}.get(kind, 0)
    if not (options.sampler in ("ancestral", "first_hitting") or options.sampler.startswith("remdm")):
        return None, None
    if not size:
        steps = length - prompt if options.sampler == "first_hitting" else options.num_steps
        calls = steps * (2 if options.guidance and prompt else 1)
        forward = forward_flops(config.model, outputs, keys=length)
        return steps, options.num_samples * length * calls * forward
    window = generation.cache_window(config.model.seq_len, size)
    steps, flops = 0, 0.0
    for start in range(0, length, size):
        keys = min(start, window) + size
        if kind == "autoregressive":
            steps, flops = steps + 1, flops + forward_flops(config.model, outputs, keys=keys)
            continue
        masked = min(size, start + size - prompt)
        calls = (masked if options.sampler == "first_hitting" else options.num_steps) if masked > 0 else 0
        noisy = calls * forward_flops(config.model, outputs, keys=keys)
        steps, flops = steps + calls, flops + noisy + forward_flops(config.model, outputs, keys=keys, output_share=0)
    return steps, options.num_samples * size * flops


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
    from nanodlm import shards
    from nanodlm.loader import train_batches

    n_vocab, length = synthetic_encoding(config).n_vocab, config.model.seq_len
    per_step = config.train.batch_size * config.train.grad_acc_steps
    dtype = shards.dtype_for(n_vocab + 1)
    ahead = 32  # twice what the loader prepares
    with tempfile.TemporaryDirectory() as folder:
        tokens = np.random.default_rng(0).integers(0, n_vocab, (max(rows, per_step), length))
        parts = np.array_split(tokens.astype(dtype), 4)
        for i, part in enumerate(parts):
            shards.write(Path(folder) / shards.name(i), part)
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
