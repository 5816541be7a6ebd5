"""Starting and supervising a stage in a process of its own, without Prefect.

The child is `nanodlm train|evaluate|sample CONFIG.json --store URL --events FILE`, in its own process group. It ends
when its parent does, writes its progress to the events file, and on SIGTERM saves and exits with 75.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from nanodlm.config import Config
from nanodlm.errors import NanodlmError, Stopped, UsageError

PARENT = "NANODLM_PARENT_PID"
GRACE_SECONDS = 60.0  # for a child to save after SIGTERM, before it is killed


def run_stage(name: str, config: Config, store_url: str, *, rebuild: bool = False, emit: Callable[..., None]) -> None:
    """Run one stage in a child process until it ends.

    Args:
        name: `train`, `evaluate` or `sample`.
        config: The run's configuration.
        store_url: Where artifacts lie.
        rebuild: Build even when the artifact exists.
        emit: Called with the child's events.

    Raises:
        Stopped: When the child saved and stopped because of a signal.
        UsageError: When the child exits with 2.
        NanodlmError: When it fails or is killed; the message is its own last line.
    """
    with tempfile.TemporaryDirectory(prefix="nanodlm-") as folder:
        config_file, events, errors = (Path(folder) / n for n in ("config.json", "events.jsonl", "stderr.txt"))
        config_file.write_text(config.model_dump_json())
        events.touch()
        command = [
            sys.executable,
            "-P",
            "-m",
            "nanodlm",
            name,
            str(config_file),
            "--store",
            store_url,
            "--events",
            str(events),
        ]
        with errors.open("wb") as stderr, events.open() as feed:
            child = subprocess.Popen(
                [*command, *(["--rebuild"] if rebuild else [])],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env={**os.environ, PARENT: str(os.getpid())},
                start_new_session=True,
            )
            try:
                while child.poll() is None:
                    for event in _new_events(feed):
                        emit(event.pop("event"), **event)
                    time.sleep(0.1)
                for event in _new_events(feed):
                    emit(event.pop("event"), **event)
            except BaseException as interruption:
                code = _stop(child)
                if code == Stopped.exit_code:
                    raise Stopped(_last_line(errors)) from interruption
                raise
            finally:
                _stop(child)
        if child.returncode:
            kind = {Stopped.exit_code: Stopped, UsageError.exit_code: UsageError}.get(child.returncode, NanodlmError)
            ending = f"signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
            raise kind(_last_line(errors) or f"the {name} process ended with {ending}; run again to continue")


def _new_events(feed: IO[str]) -> Iterator[dict[str, Any]]:
    """Whole lines written since the last call."""
    while True:
        at = feed.tell()
        line = feed.readline()
        if not line.endswith("\n"):
            feed.seek(at)
            return
        event = json.loads(line)
        event.pop("time", None)
        yield event


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("nanodlm: ") if lines else ""


def _stop(child: subprocess.Popen[bytes]) -> int:
    """Ask the child to save and stop; kill its group when it takes too long."""
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
    return child.wait()


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


def end_with_parent() -> None:
    """When a supervisor started this process, watch it and end with it: SIGTERM first, so that work is saved."""
    parent = int(os.environ.pop(PARENT, "0"))
    if not parent:
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
