"""Several processes that train together: how they join, and what they tell each other."""

import json
import os
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all
from jax.sharding import Mesh

from nanodlm.devices.mesh import batch_sharding
from nanodlm.errors import NanodlmError, UsageError


def my_share(mesh: Mesh) -> tuple[int, int]:
    """Return which part of every batch this process reads, and of how many equal ones.

    Processes whose devices all work on the same rows, because `tensor` spans them, read the same part.

    >>> from nanodlm.devices.mesh import make_mesh
    >>> my_share(make_mesh(rows=jax.device_count()))
    (0, 1)
    """
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    indices = batch_sharding(mesh).addressable_devices_indices_map((rows,))
    held = sorted({index[0].indices(rows)[0] for index in indices.values() if index})
    first, size = held[0], len(held)
    if rows % size or held != list(range(first, first + size)) or first % size:
        raise UsageError("the devices of a process hold scattered rows: change --train.fsdp or --train.tensor")
    return first // size, rows // size


def from_leader(value: Any) -> Any:
    """Return what process 0 passed, a JSON value, on all processes; all of them must call it."""
    if jax.process_count() == 1:
        return value
    encoded = np.frombuffer(json.dumps(value).encode(), np.uint8) if jax.process_index() == 0 else np.zeros(0, np.uint8)
    buffer = np.zeros(int(broadcast_one_to_all(np.int32(len(encoded)))), np.uint8)
    buffer[: len(encoded)] = encoded
    return json.loads(np.asarray(broadcast_one_to_all(buffer)).astype(np.uint8).tobytes())


def join(coordinator: str = "", processes: int | None = None, process: int | None = None) -> int:
    """Make this process one of several that train together, and return its index; call it before anything uses JAX.

    They find each other by the arguments, else by `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`,
    else by what Slurm sets when `srun` starts several tasks (one for each GPU, for JAX gives each task one). Without
    any the process is alone. Process 0 listens at `coordinator`, HOST:PORT.

    >>> join()
    0
    """
    env = os.environ
    coordinator = coordinator or env.get("JAX_COORDINATOR_ADDRESS", "")
    processes = int(env.get("JAX_NUM_PROCESSES", "0")) if processes is None else processes
    process = int(env.get("JAX_PROCESS_ID", "-1")) if process is None else process
    complete = ":" in coordinator and 0 <= process < processes
    if not complete and (coordinator or processes > 0 or process >= 0):
        flags = "--coordinator HOST:PORT, --processes N and --process I, from 0 to N - 1"
        variables = "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        found = f"{coordinator or 'no coordinator'}, {processes} processes and process {process}"
        raise UsageError(f"several processes need all of {flags}, or of {variables}: found {found}")
    slurm = not coordinator and int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_NODELIST" in env
    if not coordinator and not slurm:
        return 0
    jax.config.update("jax_enable_preemption_service", False)  # it would keep SIGTERM from us
    limits: dict[str, Any] = {"heartbeat_timeout_seconds": 30, "shutdown_timeout_seconds": 30}  # when one of them dies
    named = {} if slurm else {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
    try:
        jax.distributed.initialize(**named, **limits)
    except RuntimeError as error:
        what = f"process {process} of {processes} could not join the others at {coordinator or 'the address of Slurm'}"
        raise NanodlmError(f"{what}: {' '.join(str(error).split())[:200]}") from error
    return jax.process_index()
