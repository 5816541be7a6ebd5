"""Several processes that train together: how they join, and what they tell each other."""

import json
import os
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from nanodlm.devices.mesh import batch_sharding
from nanodlm.errors import NanodlmError, UsageError


def put_rows(mesh: Mesh, rows: np.ndarray, axis: int = 0) -> jax.Array:
    """Send rows to the devices, cut along `axis`; each process passes the rows that its devices hold.

    See `my_share` for which those are.
    """
    share, shares = my_share(mesh)
    shape = list(rows.shape)
    shape[axis] *= shares
    first = share * rows.shape[axis]

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        start, stop, _ = index[axis].indices(shape[axis])
        return rows[(slice(None),) * axis + (slice(start - first, stop - first),)]

    return jax.make_array_from_callback(tuple(shape), batch_sharding(mesh, axis), part)


def my_share(mesh: Mesh) -> tuple[int, int]:
    """Which part of every batch this process reads, and of how many equal ones.

    Processes whose devices all work on the same rows, because `tensor` spans them, read the same part.

    Raises:
        UsageError: When the rows of a process's devices are not one such part.

    >>> from nanodlm.devices.mesh import make_mesh
    >>> my_share(make_mesh(rows=jax.device_count()))
    (0, 1)
    """
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    held = batch_sharding(mesh).addressable_devices_indices_map((rows,))
    mine = sorted({index[0].indices(rows)[0] for index in held.values() if index})
    shares = rows // len(mine)
    if rows % len(mine) or mine != list(range(mine[0], mine[0] + len(mine))) or mine[0] % len(mine):
        raise UsageError("the devices of a process hold scattered rows: change --train.fsdp or --train.tensor")
    return mine[0] // len(mine), shares


def from_leader(value: Any) -> Any:
    """What process 0 has, on all processes; a JSON value. Every process must call it.

    >>> from_leader({"step": 100})
    {'step': 100}
    """
    if jax.process_count() == 1:
        return value
    from jax.experimental.multihost_utils import broadcast_one_to_all

    said = np.frombuffer(json.dumps(value).encode(), np.uint8) if jax.process_index() == 0 else np.zeros(0, np.uint8)
    buffer = np.zeros(int(broadcast_one_to_all(np.int32(len(said)))), np.uint8)
    buffer[: len(said)] = said
    return json.loads(np.asarray(broadcast_one_to_all(buffer)).astype(np.uint8).tobytes())


def any_process(value: bool) -> bool:
    """Whether it is so on any process. Every process must call it.

    >>> any_process(True)
    True
    """
    if jax.process_count() == 1:
        return value
    from jax.experimental.multihost_utils import process_allgather

    return bool(process_allgather(np.array([value])).any())


def join(coordinator: str = "", processes: int | None = None, process: int | None = None) -> int:
    """Make this process one of several that train together, before anything else uses JAX; its index among them.

    They are told of each other by the arguments, else by `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID`, else by Slurm, when `srun` starts several tasks: one for each GPU, for JAX gives each task one.
    Without any it is alone.

    Args:
        coordinator: HOST:PORT on which process 0 listens; the same for all.
        processes: How many there are.
        process: Which one this is, from 0.

    Raises:
        UsageError: For numbers that make no sense, or some but not all of the three.
        NanodlmError: When the others do not come within five minutes.

    >>> join()
    0
    """
    env = os.environ
    try:
        coordinator = coordinator or env.get("JAX_COORDINATOR_ADDRESS", "")
        processes = int(env.get("JAX_NUM_PROCESSES", "0")) if processes is None else processes
        process = int(env.get("JAX_PROCESS_ID", "-1")) if process is None else process
    except ValueError as error:
        raise UsageError(f"JAX_NUM_PROCESSES and JAX_PROCESS_ID must be whole numbers: {error}") from error
    told = bool(coordinator), processes > 0, process >= 0
    if any(told) and not all(told):
        raise UsageError(
            "several processes need all of --coordinator HOST:PORT, --processes N and --process I, or of "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        )
    if coordinator and not 0 <= process < processes:
        raise UsageError(f"process {process} is not one of {processes}: they are numbered from 0")
    if coordinator and ":" not in coordinator:
        raise UsageError(f"the coordinator {coordinator!r} has no port: give HOST:PORT")
    slurm = not coordinator and int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_NODELIST" in env
    if not coordinator and not slurm:
        return 0
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # it would keep SIGTERM from us
    limits: dict[str, Any] = {"heartbeat_timeout_seconds": 30, "shutdown_timeout_seconds": 30}  # when one of them dies
    try:
        if slurm:
            jax.distributed.initialize(**limits)
        else:
            jax.distributed.initialize(coordinator, num_processes=processes, process_id=process, **limits)
    except RuntimeError as error:
        where = f"process {process} of {processes} could not join the others at {coordinator or 'the address of Slurm'}"
        raise NanodlmError(f"{where}: {' '.join(str(error).split())[:200]}") from error
    return jax.process_index()


def is_one_of_several() -> bool:
    """Whether this process is one of several, which must then end at once after an error, not wait for the others.

    >>> is_one_of_several()
    False
    """
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()
