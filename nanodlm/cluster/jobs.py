"""Stages on other machines: a Slurm batch script, a Kubernetes JobSet, and following either through the store.

    nanodlm launch owt-1b --target slurm --nodes 4 --gpus_per_node 8 --store /shared/store --dry-run

The job runs the same `nanodlm train` as this machine would. Whoever waits for it looks into the store: the lease of
what is being built tells how far it is, and the manifest that it is done. The scheduler is asked now and then, so that
a job that failed or was cancelled is noticed. Nothing here imports JAX.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from nanodlm.cluster.commands import _last, _run, _told
from nanodlm.cluster.kubernetes import jobset
from nanodlm.cluster.settings import Launch, _job_name, _place
from nanodlm.cluster.slurm import WAITING, _slurm_job, slurm_script
from nanodlm.config import Config
from nanodlm.errors import NanodlmError, UsageError


@dataclass(frozen=True)
class Job:
    """A job that a scheduler has taken.

    Attributes:
        target: `slurm` or `k8s`.
        name: Its number at Slurm, or the name of its JobSet.
        namespace: Of the JobSet; empty is that of kubectl's context.
        found: Whether it was there already: submitted before, by somebody who has left it or waits for it as well.
    """

    target: str
    name: str
    namespace: str = ""
    found: bool = False

    def __str__(self) -> str:
        return f"{self.target} job {self.name} {'is there already' if self.found else 'is submitted'}: {self.hint}"

    @property
    def hint(self) -> str:
        """A command that shows it."""
        return f"squeue -j {self.name}" if self.target == "slurm" else f"kubectl get jobset {self.name}{self._where}"

    @property
    def _where(self) -> str:
        return f" -n {self.namespace}" if self.namespace else ""

    @property
    def _namespace(self) -> list[str]:
        return ["--namespace", self.namespace] if self.namespace else []

    @property
    def _delete(self) -> list[str]:
        """It goes when its pods have gone, for its controller takes those of another by the same name for its own."""
        kept = ["--ignore-not-found", "--cascade=foreground"]
        return ["kubectl", "delete", "jobset", self.name, *self._namespace, *kept]

    def state(self) -> tuple[Literal["waiting", "done", "failed", "unknown"], str]:
        """How it stands, and in words: `waiting` is queued or running, `unknown` is without an answer."""
        return self._slurm_state() if self.target == "slurm" else self._k8s_state()

    def _slurm_state(self) -> tuple[Literal["waiting", "done", "failed", "unknown"], str]:
        code, said, error = _run(["squeue", "--noheader", "--states=all", "--format=%T", "-j", self.name])
        if code == 0 and said:
            word = said.split()[0]
        elif code == 0 or "Invalid job id" in error:  # ended long ago: accounting may know
            code, said, _ = _run(["sacct", "--noheader", "-X", "-P", "--format=State", "-j", self.name])
            word = said.split()[0] if code == 0 and said else "gone from the queue"
        else:
            return "unknown", _last(error)
        if word in WAITING:
            return "waiting", word
        return ("done", word) if word == "COMPLETED" else ("failed", f"it is {word}{self._slurm_log()}")

    def _slurm_log(self) -> str:
        """The last line of its output, and where that lies."""
        _, said, _ = _run(["scontrol", "--oneliner", "show", "job", self.name])
        path = next((word.removeprefix("StdOut=") for word in said.split() if word.startswith("StdOut=")), "")
        try:
            lines = Path(path).read_text(errors="replace").strip().splitlines()
        except OSError:
            return ""
        told = [line for line in lines if line.startswith("nanodlm: ")] or lines
        return f" ({told[-1].removeprefix('nanodlm: ')}; see {path})" if told else f" (see {path})"

    def _k8s_state(self) -> tuple[Literal["waiting", "done", "failed", "unknown"], str]:
        where = self._namespace
        code, said, error = _run(["kubectl", "get", "jobset", self.name, *where, "--output=json"])
        if code and "NotFound" in error:
            return "failed", "it has been deleted"
        try:
            found = json.loads(said)
        except ValueError:
            return "unknown", _last(error)
        if found.get("metadata", {}).get("deletionTimestamp"):
            return "failed", "it is being deleted"
        status = found.get("status", {})
        ended = {c["type"]: c.get("message", "") for c in status.get("conditions", []) if c.get("status") == "True"}
        if "Completed" in (status.get("terminalState"), *ended):
            return "done", "Completed"
        if "Failed" in (status.get("terminalState"), *ended):
            label = f"jobset.sigs.k8s.io/jobset-name={self.name}"
            _, log, _ = _run(["kubectl", "logs", *where, "--selector", label, "--tail=1"])
            return "failed", _last(log).removeprefix("nanodlm: ") or ended.get("Failed", "") or "it has failed"
        return "waiting", f"restarted {status.get('restarts', 0)} times"

    def cancel(self) -> None:
        """End it, if it has not ended; it saves first. That the scheduler cannot be asked is not an error."""
        if self.target == "slurm":
            _run(["scancel", self.name])
        else:
            _run([*self._delete, "--wait=false"])


def submit(stage: str, config: Config, store_url: str, launch: Launch, *, rebuild: bool = False) -> Job:
    """Hand a stage to the scheduler, unless a job for the same work is there and has not ended.

    Args:
        stage: train, evaluate or sample.
        config: The run's configuration.
        store_url: A store that all hosts see.
        launch: The hosts.
        rebuild: Whether to build even when the artifact exists.

    Raises:
        UsageError: When the hosts would not see the store, or the target is `process`.
        NanodlmError: When the scheduler's program is not here, or refuses.
    """
    if launch.target == "slurm":
        script = slurm_script(config, store_url, launch, rebuild, stage=stage)
        name = _job_name(stage, config, _place(stage, store_url, launch), rebuild)
        if number := _slurm_job(name, launch.grace_seconds + 60):
            return Job("slurm", number, found=True)
        said = _told("sbatch", ["--parsable"], script, "run this where jobs are submitted to Slurm")
        return Job("slurm", said.split(";")[0].strip())
    if launch.target == "k8s":
        manifest = jobset(config, store_url, launch, rebuild, stage=stage)
        job = Job("k8s", manifest["metadata"]["name"], launch.namespace)
        state, _ = job.state()
        if state == "waiting":
            return replace(job, found=True)
        if state != "unknown":  # one that has ended keeps its name for a week
            code, _, error = _run(job._delete, seconds=launch.grace_seconds + 60)
            if code:
                raise NanodlmError(f"the JobSet {job.name} has ended and does not go away: {_last(error)}")
        remedy = "install it and give it a context for the cluster"
        _told("kubectl", ["create", "--filename=-"], json.dumps(manifest), remedy)
        return job
    raise UsageError(f"nothing submits a process: `nanodlm {stage}` runs it here; choose --target slurm or k8s")
