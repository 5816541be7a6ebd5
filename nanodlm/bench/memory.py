"""What one device holds and does in an update, from compiling it ahead of time for devices that need not exist.

    nanodlm plan owt-1b --devices 64 --train.fsdp 8

`plan` starts a child process in which N virtual CPU devices stand for the real ones, because JAX takes their number
once, when it starts; the child calls `measure` and prints its result. No parameter is ever made.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nanodlm.config import Config, load_config
from nanodlm.errors import NanodlmError, UsageError
from nanodlm.stages.process import PARENT, end_with_parent

LIMIT_SECONDS = 600.0
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def plan(config: Config, devices: int) -> dict[str, Any]:
    """Compile one update for so many devices, in a child process; it ends with this one, and after ten minutes.

    Args:
        config: What to train; `train.fsdp` and `train.tensor` shape the mesh.
        devices: How many share the work.

    Returns:
        What `measure` returns.

    Raises:
        UsageError: When the devices cannot share rows or parameters.
        NanodlmError: When the child fails, or takes longer than that.

    Example:
        plan(nanodlm.PRESETS["owt-1b"], 64)["bytes"]["total"]
    """
    if devices < 1:
        raise UsageError(f"nothing is planned for {devices} devices: raise --devices")
    virtual = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        PARENT: str(os.getpid()),
    }
    with tempfile.TemporaryDirectory(prefix="nanodlm-") as folder:
        path = Path(folder) / "config.json"
        path.write_text(config.model_dump_json())
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-m", "nanodlm.bench.memory", str(path)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                env={**os.environ, **virtual},
                timeout=LIMIT_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise NanodlmError(
                f"compiling for {devices} devices took more than {LIMIT_SECONDS:.0f} s: plan for fewer"
            ) from None
    said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode:
        kind = UsageError if done.returncode == UsageError.exit_code else NanodlmError
        ending = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise kind(said[-1] if said and done.returncode > 0 else f"compiling for {devices} devices ended with {ending}")
    if not said:
        raise NanodlmError(f"compiling for {devices} devices ended without a result: run again")
    return json.loads(said[-1])


def measure(config: Config) -> dict[str, Any]:
    """Compile one update for the devices of this process.

    Returns:
        `devices`; `mesh`, its axes; `parameters`, their number; `tokens_per_update`; `flops_per_update`, by the formula
        of `bench`; `bytes`, of one device; `collectives`, how many of each kind stand in the program, where those in a
        loop count once; `compile_seconds`.

        Of the bytes, `parameters`, `optimizer`, `average` and `rows` are exact, and so is `gradients`, float32 and cut
        like the parameters. `temporaries`, of which the gradients are a part, are what this backend's compiler plans.
        `total` is all of them, but for the gradients.

    Raises:
        UsageError: When the devices cannot share rows or parameters.

    Example:
        measure(nanodlm.PRESETS["demo"])["bytes"]["parameters"]
    """
    from nanodlm.bench.flops import flops_per_update, synthetic_encoding
    from nanodlm.data.vocabulary import Vocabulary
    from nanodlm.devices.mesh import bytes_per_device, make_mesh
    from nanodlm.training.step import abstract_rows, compile_step, make_program

    train = config.train
    mesh = make_mesh(train.batch_size, fsdp=train.fsdp, tensor=train.tensor)
    began = time.perf_counter()
    program = make_program(config, Vocabulary.of(synthetic_encoding(config)), mesh)
    compiled = compile_step(config, program, mesh)
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    assert memory is not None
    held = {name: bytes_per_device(program.state[name]) for name in program.state}
    size = {
        "parameters": held["model_state"],
        "optimizer": held["optimizer_state"],
        "average": held.get("ema_state", 0),
        "rows": bytes_per_device(abstract_rows(config, mesh)),
        "temporaries": memory.temp_size_in_bytes,
    }
    text = compiled.as_text() or ""
    return {
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "parameters": program.n_parameters,
        "tokens_per_update": train.grad_acc_steps * train.batch_size * config.model.seq_len,
        "flops_per_update": flops_per_update(config),
        "bytes": {**size, "gradients": held["model_state"], "total": sum(size.values())},
        "collectives": {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COLLECTIVES},
        "compile_seconds": seconds,
    }


def table(planned: dict[str, Any]) -> str:
    """What people read of a plan that `plan` returned."""
    of = {name: f"{size / 2**20:>10,.1f} MiB" for name, size in planned["bytes"].items()}
    collectives = [f"{count} {name}" for name, count in planned["collectives"].items() if count]
    return "\n".join(
        [
            f"{planned['devices']} devices: " + " x ".join(f"{name} {n}" for name, n in planned["mesh"].items()),
            f"{planned['parameters']:,} parameters; an update takes {planned['tokens_per_update']:,} tokens and "
            f"{planned['flops_per_update']:.3g} FLOPs",
            "",
            "on each device",
            f"parameters   {of['parameters']}",
            f"optimizer    {of['optimizer']}",
            f"average      {of['average']}",
            f"rows         {of['rows']}",
            f"temporaries  {of['temporaries']}  an indication; gradients are {of['gradients'].strip()} of it",
            f"total        {of['total']}",
            "",
            "Temporaries are what XLA plans for a CPU, which has no fused attention and holds bfloat16 products as it "
            "likes;",
            "a GPU's or TPU's differ. The other sizes are exact.",
            f"collectives  {', '.join(collectives) or 'none'} (those in a loop count once)",
            f"compilation  {planned['compile_seconds']:.1f} s",
        ]
    )


if __name__ == "__main__":
    end_with_parent()
    try:
        sys.stdout.write(json.dumps(measure(load_config(sys.argv[1]))) + "\n")
    except NanodlmError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
