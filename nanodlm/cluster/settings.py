"""Where a job of a cluster runs and what it does, and how schedulers' programs are asked."""

import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from nanodlm.config import Config, Group, training_settings
from nanodlm.errors import NanodlmError, UsageError
from nanodlm.stages.process import last_line, stage_flags
from nanodlm.store import Store, fingerprint_of

MOUNT = "/store"  # where `Launch.store_volume` lies in a pod
PORT = 4321  # of the first pod, on which the others find it
LOOK_SECONDS = 2.0  # between looks into the store


class Launch(Group):
    """Where a stage that uses JAX runs, and with what."""

    target: Literal["process", "slurm", "k8s"] = "process"
    """A process of this machine, a Slurm job, or a Kubernetes JobSet."""
    nodes: int = Field(default=1, ge=1, le=4096)
    """Hosts that train together; other stages take one."""
    gpus_per_node: int = Field(default=1, ge=0, le=64)
    """GPUs of each host: a Slurm task for each of them, or all for one pod; 0 is CPUs only."""
    grace_seconds: int = Field(default=120, ge=60, le=3600)
    """Seconds from the signal that ends a job until it is killed, for saving a checkpoint."""
    image: str = ""
    """Kubernetes: the container image, with nanodlm in it; see deploy/Dockerfile."""
    store_volume: str = ""
    """Kubernetes: a PersistentVolumeClaim that all pods share, mounted at /store, where the store then lies."""
    secret: str = ""
    """Kubernetes: a Secret whose entries become environment variables, such as the credentials of a bucket."""

    @model_validator(mode="after")
    def _check_target(self) -> Self:
        given = {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}
        foreign = {"process": given - {"target"}, "slurm": given & {"image", "store_volume", "secret"}, "k8s": set()}
        if self.target == "k8s" and not self.image:
            raise ValueError("target k8s needs an image: build one from deploy/Dockerfile, push it, and name it")
        if names := sorted(foreign[self.target]):
            raise ValueError(f"target {self.target} has no use for {', '.join(names)}: leave that out")
        return self


@dataclass(frozen=True)
class Work:
    """What a job is to do, and where its hosts find the store; without fingerprints of its inputs it looks them up."""

    config: Config
    store: str
    launch: Launch
    stage: str = "train"
    inputs: dict[str, str] = field(default_factory=dict)
    rebuild: bool = False

    @property
    def nodes(self) -> int:
        """How many hosts it takes: only training is shared."""
        return self.launch.nodes if self.stage == "train" else 1

    @property
    def name(self) -> str:
        """The job's name, the same for the same work, so that a job that somebody has left is found again."""
        config = self.config
        work: dict[str, Any] = {"store": Store(self.store).uri(), "rebuild": self.rebuild}
        work |= {"data": config.data.model_dump(mode="json"), "train": training_settings(config)}
        work["from"] = config.exp.resume_path
        if self.stage != "train":
            work[self.stage] = {"evaluate": config.eval, "sample": config.sample}[self.stage].model_dump(mode="json")
        return f"nanodlm-{self.stage}-{fingerprint_of(work)[:12]}"

    def flags(self) -> list[str]:
        """Return what follows the configuration in the job's command, if its hosts see the store."""
        store, pods = Store(self.store), self.launch.target == "k8s"
        address = store.uri()
        if address.startswith("memory:"):
            raise UsageError("a store in memory is seen by no other process: give --store a shared folder or a bucket")
        if self.nodes > 1 and not store.is_local:
            what = f"several hosts save one checkpoint together, so {address} cannot be their store"
            remedy = "give --store a folder on a disk that they share, and `nanodlm copy` the result to the bucket"
            raise UsageError(f"{what}: {remedy}")
        if pods and store.is_local and not (self.launch.store_volume and Path(store.root).is_relative_to(MOUNT)):
            remedy = f"give --store a bucket, or {MOUNT} or a folder in it, where pods see their --store_volume"
            raise UsageError(f"no pod sees the folder {address}: {remedy}")
        return stage_flags(address, self.inputs, rebuild=self.rebuild)


@dataclass(frozen=True)
class Job:
    """A job that a scheduler has taken."""

    name: str  # its number at Slurm, or that of its JobSet
    hint: str  # a command that shows it
    found: bool  # it was submitted before, by somebody who has left it or waits for it as well

    def __str__(self) -> str:
        return f"job {self.name} is {'there already' if self.found else 'submitted'}: {self.hint}"


def ask(*command: str, text: str = "", seconds: float = 60) -> tuple[int, str, str]:
    """Run a scheduler's program: its exit code, output and errors; 127 when it is not there or hangs."""
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 127, "", str(error)
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def answer_of(*command: str, text: str = "", seconds: float = 60) -> str:
    """Run a scheduler's program, and return its output; one that is not there or refuses is an error."""
    code, answer, error = ask(*command, text=text, seconds=seconds)
    if code:
        remedy = "run this where jobs are submitted, or print the job with --dry-run"
        raise NanodlmError(f"{command[0]} failed ({last_line(error) or f'exit code {code}'}): {remedy}")
    return answer
