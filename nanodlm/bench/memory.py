"""What one device holds and does in an update, found by compiling the update for devices that need not exist.

    nanodlm plan owt-1b --devices 64 --train.fsdp 8

Virtual CPU devices stand for the real ones, so JAX must not have been used in this process before.
"""

import math
import os
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

from nanodlm.config import Config
from nanodlm.errors import UsageError


def peak_memory() -> int:
    """Return the most bytes that this process has held: Linux's `getrusage` tells its parent's if that held more."""
    if sys.platform == "linux":
        return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def plan(config: Config, devices: int) -> dict[str, Any]:
    """Compile one update for so many devices, in a mesh of `train.fsdp` and `train.tensor`.

    The `bytes` are those of one device: `parameters`, `optimizer`, `average` and `rows` are exact, and so is
    `gradients`, float32 and cut like the parameters. `temporaries`, of which the gradients are a part, are what this
    backend's compiler plans. `total` is all of them, but for the gradients.
    """
    if devices < 1:
        raise UsageError(f"nothing is planned for {devices} devices: raise --devices")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's warnings of slow layouts help nobody here
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_enable_compilation_cache", False)  # what comes out of the cache says nothing of its memory

    from nanodlm.bench.flops import flops_per_update, synthetic_encoding
    from nanodlm.data.vocabulary import Vocabulary
    from nanodlm.training.step import make_program

    began = time.perf_counter()
    program = make_program(config, Vocabulary.of(synthetic_encoding(config)))
    compiled = program.compile(config.train.seed)
    seconds = time.perf_counter() - began

    def held(tree: Any) -> int:
        leaves = jax.tree.leaves(tree)
        return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)

    size = {
        "parameters": held(program.state["model_state"]),
        "optimizer": held(program.state["optimizer_state"]),
        "average": held(program.state.get("ema_state", ())),
        "rows": held(program.rows),
        "temporaries": getattr(compiled.func.memory_analysis(), "temp_size_in_bytes", 0),  # type: ignore[attr-defined]
    }
    return {
        "devices": devices,
        "mesh": dict(program.mesh.shape),
        "parameters": program.n_parameters,
        "tokens_per_update": math.prod(program.rows.shape),
        "flops_per_update": flops_per_update(config),
        "bytes": {**size, "gradients": size["parameters"], "total": sum(size.values())},
        "compile_seconds": seconds,
    }


def table(planned: dict[str, Any]) -> str:
    """Lay out for people what `plan` returned."""
    work = f"{planned['tokens_per_update']:,} tokens and {planned['flops_per_update']:.3g} FLOPs"
    lines = [
        f"{planned['devices']} devices: " + " x ".join(f"{name} {n}" for name, n in planned["mesh"].items()),
        f"{planned['parameters']:,} parameters; an update takes {work}",
        "\non each device",
        *(f"{name:<12} {size / 2**20:>10,.1f} MiB" for name, size in planned["bytes"].items()),
        "\nTemporaries, of which gradients are a part, are an indication: what XLA plans for a CPU, which has no fused",
        "attention and holds bfloat16 products as it likes. The other sizes are exact.",
        f"compilation  {planned['compile_seconds']:.1f} s",
    ]
    return "\n".join(lines)
