"""Where a job of a cluster is to run, and with what."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from nanodlm.config import Config, Group
from nanodlm.errors import UsageError
from nanodlm.store import Store, fingerprint_of

MOUNT = "/store"  # where `Launch.store_volume` lies in a pod
PORT = 4321  # of the first pod, on which the others find it
LOOK_SECONDS = 2.0  # between looks into the store
LONGEST = 120_000  # bytes of a configuration: Linux takes no word above 128 KiB
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


def _nodes(stage: str, launch: Launch) -> int:
    """Hosts that a stage uses: only training is shared."""
    return launch.nodes if stage == "train" else 1


def _place(stage: str, store_url: str, launch: Launch) -> str:
    """The store's address as the job will use it.

    Raises:
        UsageError: When the job's hosts would not all see it.
    """
    store = Store(store_url)
    address = store.uri()
    if address.startswith("memory:"):
        raise UsageError("a store in memory is seen by no other process: give --store a shared folder or a bucket")
    if _nodes(stage, launch) > 1 and not store.is_local:
        raise UsageError(
            f"several hosts save one checkpoint together, so {address} cannot be their store: give --store a folder on "
            "a disk that they share, and `nanodlm copy` the result to the bucket"
        )
    if launch.target == "k8s" and store.is_local:
        if not launch.store_volume:
            raise UsageError(
                f"no pod sees the folder {address} of this machine: give --store a bucket, or name a volume that pods "
                f"share with --store_volume and give --store {MOUNT} or a folder in it"
            )
        if not Path(store.root).is_relative_to(MOUNT):
            raise UsageError(
                f"the volume {launch.store_volume} is mounted at {MOUNT}, and {address} is not in it: give --store "
                f"{MOUNT}, or a folder in it"
            )
    return address


def _job_name(stage: str, config: Config, place: str, rebuild: bool) -> str:
    """A name that is the same for the same artifact, so that a job that somebody has left is found again."""
    work: dict[str, Any] = {"store": place, "rebuild": rebuild, "data": config.data.model_dump(mode="json")}
    work |= {"train": config.training(), "from": config.exp.resume_path}
    if stage != "train":
        work[stage] = {"evaluate": config.eval, "sample": config.sample}[stage].model_dump(mode="json")
    return f"nanodlm-{stage}-{fingerprint_of(work)[:12]}"


def _argument(text: str) -> str:
    """A configuration as one word of a command.

    Raises:
        UsageError: When it is longer than Linux lets a word be.
    """
    if len(text.encode()) > LONGEST:
        raise UsageError(
            f"the settings take {len(text.encode()):,} bytes, more than a job's command may hold: give --data.source "
            "as a glob, in quotes, instead of each file"
        )
    return text
