"""Slurm: a job's batch script, submitting it, and asking how it stands."""

import shlex
import sys
import time
from pathlib import Path
from typing import Literal

from nanodlm.cluster.settings import LOOK_SECONDS, Job, Work, ask, hand_over
from nanodlm.errors import NanodlmError, Stopped
from nanodlm.stages.process import last_line

WAITING = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING"}
WAITING |= {"REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD", "STAGE_OUT", "REVOKED"}


def job_text(work: Work) -> str:
    """Write a batch script for Slurm.

    It starts one task for each GPU; they find each other by themselves (see `devices.hosts.join`). Before the time
    limit, when it is preempted, or on `scancel --signal=TERM`, the job's tasks save and end with 75, and the script
    puts the job back into the queue. Environment variables come from where it is submitted; no secret is in the script.
    """
    launch, stage = work.launch, work.stage
    options = {
        "job-name": work.name,
        "nodes": work.nodes,
        "ntasks-per-node": max(1, launch.gpus_per_node) if stage == "train" else 1,
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
    lines = [f"#SBATCH --{n}{'' if v is True else f'={v}'}\n" for n, v in options.items() if v is not None]
    srun = ["srun", "--kill-on-bad-exit=0", "--wait=600"]  # seconds for other tasks to end after the first has
    if launch.cpus_per_task:
        srun.append(f"--cpus-per-task={launch.cpus_per_task}")  # which it does not take from the job
    command = shlex.join([*srun, sys.executable, "-P", "-m", "nanodlm", stage])
    return f"""#!/usr/bin/env bash
{"".join(lines)}set -uo pipefail

config=$(cat <<'CONFIG'
{work.config.model_dump_json(indent=1)}
CONFIG
)

{command} "$config" {shlex.join(work.flags())}
code=$?
if [ $code -eq {Stopped.exit_code} ]; then  # a signal ended it and it has saved: go on later
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
"""


def submit(work: Work) -> Job:
    """Submit a job, unless one for the same work waits or runs; one that is ending is waited for."""
    script, deadline = job_text(work), time.monotonic() + work.launch.grace_seconds + 60
    states = "PENDING,CONFIGURING,RUNNING,SUSPENDED,COMPLETING"
    while True:
        words = ["squeue", "--noheader", "--me", f"--name={work.name}", f"--states={states}", "--format=%i %T"]
        code, answer, error = ask(words)
        if code not in (0, 127):
            raise NanodlmError(f"squeue does not say whether the job is there already: {last_line(error)}")
        jobs = [line.split() for line in answer.splitlines()]
        going_on = [number for number, state in jobs if state != "COMPLETING"]
        if going_on or not jobs or time.monotonic() > deadline:
            break
        time.sleep(LOOK_SECONDS)
    remedy = "run this where jobs are submitted to Slurm"
    number = going_on[0] if going_on else hand_over(["sbatch", "--parsable"], script, remedy).split(";")[0]
    return Job(work.launch, number, f"squeue -j {number}", found=bool(going_on))


def state(job: Job) -> tuple[Literal["waiting", "done", "failed", "unknown"], str]:
    """Ask how a job stands, and in words: `waiting` is queued or running, `unknown` is without an answer."""
    code, answer, error = ask(["squeue", "--noheader", "--states=all", "--format=%T", "-j", job.name])
    if code and "Invalid job id" not in error:
        return "unknown", last_line(error)
    if not answer:  # it ended long ago, and only accounting may still know it
        _, answer, _ = ask(["sacct", "--noheader", "-X", "-P", "--format=State", "-j", job.name])
    word = answer.split()[0] if answer else "gone from the queue"
    if word in WAITING or word == "COMPLETED":
        return "waiting" if word in WAITING else "done", word
    _, answer, _ = ask(["scontrol", "--oneliner", "show", "job", job.name])
    path = next((word.removeprefix("StdOut=") for word in answer.split() if word.startswith("StdOut=")), "")
    try:
        lines = Path(path).read_text(errors="replace").strip().splitlines()
    except OSError:
        return "failed", f"it is {word}"
    own = [line for line in lines if line.startswith("nanodlm: ")] or lines
    return "failed", f"it is {word} ({last_line(own[-1])}; see {path})" if own else f"it is {word} (see {path})"


def cancel(job: Job) -> None:
    """End a job, if it has not ended; it saves first. That Slurm cannot be asked is not an error."""
    ask(["scancel", job.name])
