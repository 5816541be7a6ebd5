"""Slurm: the batch script of a job, and what the scheduler says of it."""

import shlex
import sys
import time

from nanodlm.cluster.commands import _last, _run
from nanodlm.cluster.settings import LOOK_SECONDS, Launch, _argument, _job_name, _nodes, _place
from nanodlm.config import Config
from nanodlm.errors import NanodlmError, Stopped

WAIT_SECONDS = 600  # for the other tasks of a Slurm job to end after the first has
WAITING = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING"}
WAITING |= {"REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD", "STAGE_OUT", "REVOKED"}


def slurm_script(config: Config, store_url: str, launch: Launch, rebuild: bool = False, *, stage: str = "train") -> str:
    """A batch script for Slurm.

    One task for each GPU; they find each other by themselves (see `launch.join`). Before the time limit, when it is
    preempted, or on `scancel --signal=TERM`, the job's tasks save and end with 75, and the script puts the job back
    into the queue. Environment variables come from where it is submitted; nothing secret is in the script.

    Args:
        config: The run's configuration, which the script holds.
        store_url: A store that all hosts see.
        launch: The hosts.
        rebuild: Whether to build even when the artifact exists.
        stage: train, evaluate or sample.

    Raises:
        UsageError: When the hosts would not all see the store.

    >>> slurm_script(Config(), "/shared/store", Launch(target="slurm", nodes=2, gpus_per_node=8)).splitlines()[2:4]
    ['#SBATCH --nodes=2', '#SBATCH --ntasks-per-node=8']
    """
    place, nodes = _place(stage, store_url, launch), _nodes(stage, launch)
    tasks = max(1, launch.gpus_per_node) if stage == "train" else 1
    options = {
        "job-name": _job_name(stage, config, place, rebuild),
        "nodes": nodes,
        "ntasks-per-node": tasks,
        "gpus-per-node": launch.gpus_per_node or None,
        "cpus-per-task": launch.cpus_per_task,
        "mem": launch.memory_gb and f"{launch.memory_gb}G",
        "time": launch.time_limit,
        "partition": launch.partition or None,
        "account": launch.account or None,
        "signal": f"TERM@{launch.grace_seconds}",  # to the tasks, not to this script
        "output": f"nanodlm-{stage}-%j.out",
        "open-mode": "append",
        "requeue": True,
    }
    lines = [f"#SBATCH --{n}{'' if v is True else f'={v}'}" for n, v in options.items() if v is not None]
    srun = ["srun", "--kill-on-bad-exit=0", f"--wait={WAIT_SECONDS}"]
    if launch.cpus_per_task:
        srun.append(f"--cpus-per-task={launch.cpus_per_task}")  # which it does not take from the job
    words = [*srun, sys.executable, "-P", "-m", "nanodlm", stage]
    text = _argument(config.model_dump_json(indent=1))
    return "\n".join([
        "#!/usr/bin/env bash",
        *lines,
        "set -uo pipefail",
        "",
        "config=$(cat <<'CONFIG'",
        text,
        "CONFIG",
        ")",
        "",
        f'{shlex.join(words)} "$config" --store {shlex.quote(place)}{" --rebuild" if rebuild else ""}',
        "code=$?",
        f"if [ $code -eq {Stopped.exit_code} ]; then  # a signal ended it and it has saved: go on later",
        '    scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        "exit $code",
        "",
    ])  # fmt: skip


def _slurm_job(name: str, patience: float) -> str:
    """The number of the caller's job of that name that waits or runs, or an empty string.

    One that is ending, and may yet go back into the queue, is waited for.

    Raises:
        NanodlmError: When Slurm does not say.
    """
    states, deadline = "PENDING,CONFIGURING,RUNNING,SUSPENDED,COMPLETING", time.monotonic() + patience
    while True:
        words = ["squeue", "--noheader", "--me", f"--name={name}", f"--states={states}", "--format=%i %T"]
        code, said, error = _run(words)
        if code not in (0, 127):
            raise NanodlmError(f"squeue does not say whether the job is there already: {_last(error)}")
        jobs = [line.split() for line in said.splitlines()]
        if found := [number for number, state in jobs if state != "COMPLETING"]:
            return found[0]
        if not jobs or time.monotonic() > deadline:
            return ""
        time.sleep(LOOK_SECONDS)
