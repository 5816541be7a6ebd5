"""Slurm: a job's batch script, submitting it, and asking how it stands."""

import shlex
import sys
from pathlib import Path

from nanodlm.cluster.settings import Job, Work, answer_of, ask
from nanodlm.errors import Stopped
from nanodlm.stages.process import last_line

ENDED = "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED TIMEOUT".split()


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
        "signal": f"TERM@{launch.grace_seconds}",  # to the tasks, not to this script
        "dependency": "singleton",  # it waits for one of its name that is still ending
        "output": f"nanodlm-{stage}-%j.out",
        "open-mode": "append",
        "requeue": True,
    }
    lines = [f"#SBATCH --{n}{'' if v is True else f'={v}'}\n" for n, v in options.items() if v is not None]
    srun = ["srun", "--kill-on-bad-exit=0", "--wait=600"]  # seconds for other tasks to end after the first has
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
    """Submit a job, unless one for the same work waits or runs."""
    script, states = job_text(work), "PENDING,CONFIGURING,RUNNING,SUSPENDED"
    there = answer_of("squeue", "--noheader", "--me", f"--name={work.name}", f"--states={states}", "--format=%i")
    number = there.split()[0] if there else answer_of("sbatch", "--parsable", text=script).split(";")[0]
    return Job(number, f"squeue -j {number}", found=bool(there))


def ended(name: str) -> str | None:
    """Say why a job did not finish, nothing if it did; None while it waits or runs, or Slurm does not answer."""
    code, answer, error = ask("scontrol", "--oneliner", "show", "job", name)
    if code and "Invalid job id" not in error:
        return None
    told = dict(word.split("=", 1) for word in answer.split() if "=" in word)
    state, output = told.get("JobState", "gone from the queue"), Path(told.get("StdOut", ""))
    if state == "COMPLETED" or (answer and state not in ENDED):
        return "" if state == "COMPLETED" else None
    lines = output.read_text(errors="replace").splitlines() if output.is_file() else []
    said = [last_line(line) for line in lines if line.startswith("nanodlm: ")]
    return f"it is {state} ({'; '.join([*said[-1:], f'see {output}'])})" if lines else f"it is {state}"


def cancel(name: str) -> None:
    """End a job, if it has not ended; it saves first. That Slurm cannot be asked is not an error."""
    ask("scancel", name)
