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
NAME = r"^[A-Za-z0-9]([A-Za-z0-9_.,-]*[A-Za-z0-9])?$|^$"
K8S_NAME = r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$|^$"


class Launch(Group):
    """Where a stage that uses JAX runs, and with what."""

    target: Literal["process", "slurm", "k8s"] = "process"
    """A process of this machine, a Slurm job, or a Kubernetes JobSet."""
    nodes: int = Field(default=1, ge=1, le=4096)
    """Hosts that train together; other stages take one."""
    gpus_per_node: int = Field(default=1, ge=0, le=64)
    """GPUs of each host: a Slurm task for each of them, or all for one pod; 0 is CPUs only."""
    cpus_per_task: int | None = Field(default=None, ge=1, le=4096)
    """CPU cores of each Slurm task or pod; none leaves it to the cluster."""
    memory_gb: int | None = Field(default=None, ge=1)
    """Memory of each host in GB; none leaves it to the cluster."""
    grace_seconds: int = Field(default=120, ge=60, le=3600)
    """Seconds from the signal that ends a job until it is killed, for saving a checkpoint."""
    time_limit: int | None = Field(default=None, ge=10)
    """Slurm: minutes after which the job saves and goes back into the queue; none is the partition's limit."""
    partition: str = Field(default="", pattern=NAME)
    """Slurm: the partition, or several with commas."""
    account: str = Field(default="", pattern=NAME)
    """Slurm: the account that pays."""
    image: str = Field(default="", pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:@-]*$|^$")
    """Kubernetes: the container image, with nanodlm in it; see deploy/Dockerfile."""
    namespace: str = Field(default="", pattern=K8S_NAME)
    """Kubernetes: the namespace; empty is that of kubectl's context."""
    queue: str = Field(default="", pattern=K8S_NAME)
    """Kubernetes: the Kueue queue that admits the job; empty is none."""
    store_volume: str = Field(default="", pattern=K8S_NAME)
    """Kubernetes: a PersistentVolumeClaim that all pods share, mounted at /store, where the store then lies."""
    secret: str = Field(default="", pattern=K8S_NAME)
    """Kubernetes: a Secret whose entries become environment variables, such as the credentials of a bucket."""
    service_account: str = Field(default="", pattern=K8S_NAME)
    """Kubernetes: the service account, for clouds that give it access to the bucket."""
    restarts: int = Field(default=3, ge=0, le=1000)
    """Kubernetes: failures after which the job is given up; what a signal ended goes on without being counted."""

    @model_validator(mode="after")
    def _check_target(self) -> Self:
        slurm = {"time_limit", "partition", "account"}
        k8s = {"image", "namespace", "queue", "store_volume", "secret", "service_account", "restarts"}
        other = set(type(self).model_fields) - {"target"} - slurm - k8s
        foreign = {"process": other | slurm | k8s, "slurm": k8s, "k8s": slurm}[self.target]
        given = [n for n in foreign if getattr(self, n) != type(self).model_fields[n].default]
        if given:
            raise ValueError(f"target {self.target} has no use for {', '.join(sorted(given))}: leave that out")
        if self.time_limit and self.grace_seconds > 30 * self.time_limit:
            raise ValueError(f"grace_seconds {self.grace_seconds} leaves little of time_limit {self.time_limit}")
        if self.target == "k8s" and not self.image:
            raise ValueError("target k8s needs an image: build one from deploy/Dockerfile, push it, and name it")
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
        """Return what follows the configuration in the job's command, if its hosts see all that they are to read."""
        store, volume, pods = Store(self.store), self.launch.store_volume, self.launch.target == "k8s"
        address = store.uri()
        if address.startswith("memory:"):
            raise UsageError("a store in memory is seen by no other process: give --store a shared folder or a bucket")
        if self.nodes > 1 and not store.is_local:
            what = f"several hosts save one checkpoint together, so {address} cannot be their store"
            remedy = "give --store a folder on a disk that they share, and `nanodlm copy` the result to the bucket"
            raise UsageError(f"{what}: {remedy}")
        if pods and store.is_local and not (volume and Path(store.root).is_relative_to(MOUNT)):
            sees = f"only {MOUNT} is mounted in pods" if volume else "name a volume that pods share with --store_volume"
            remedy = f"give --store {MOUNT} or a folder in it, or a bucket"
            raise UsageError(f"no pod sees the folder {address}: {sees}; {remedy}")
        for source in self.config.data.source if pods and not self.inputs else ():
            mounted = volume and source.startswith(f"{MOUNT}/")
            if source != "sotu" and "://" not in source and not mounted:
                raise UsageError(f"no pod sees the file {source}: give --data.source a URL, or a path below {MOUNT}")
        return stage_flags(address, self.inputs, rebuild=self.rebuild)


@dataclass(frozen=True)
class Job:
    """A job that a scheduler has taken."""

    launch: Launch
    name: str  # its number at Slurm, or that of its JobSet
    hint: str  # a command that shows it
    found: bool = False  # it was submitted before, by somebody who has left it or waits for it as well

    def __str__(self) -> str:
        return f"{self.launch.target} job {self.name} is {'there already' if self.found else 'submitted'}: {self.hint}"


def ask(command: list[str], text: str = "", seconds: float = 60) -> tuple[int, str, str]:
    """Run a scheduler's program: its exit code, output and errors; 127 when it is not there, 124 when it hangs."""
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=seconds)
    except FileNotFoundError:
        return 127, "", f"{command[0]} is not there"
    except subprocess.TimeoutExpired:
        return 124, "", f"{command[0]} did not answer within {seconds:.0f} s"
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def hand_over(command: list[str], job: str, remedy: str) -> str:
    """Give a job to a scheduler's program, and return its answer; one that is not there or refuses is an error."""
    code, answer, error = ask(command, job)
    if code == 127:
        raise NanodlmError(f"there is no program {command[0]} here: {remedy}, or print the job with --dry-run")
    if code:
        raise NanodlmError(f"{command[0]} did not take the job: {last_line(error) or f'exit code {code}'}")
    return answer
