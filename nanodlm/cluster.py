"""Stages on other machines: a Slurm batch script, a Kubernetes JobSet, and following either through the store.

    nanodlm launch owt-1b --target slurm --nodes 4 --gpus_per_node 8 --store /shared/store --dry-run

The job runs the same `nanodlm train` as this machine would. Whoever waits for it looks into the store: the lease of
what is being built tells how far it is, and the manifest that it is done. The scheduler is asked now and then, so that
a job that failed or was cancelled is noticed. Nothing here imports JAX.
"""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from nanodlm import launch as here
from nanodlm import stages
from nanodlm.config import Config, Group
from nanodlm.errors import NanodlmError, Stopped, Unreachable, UsageError
from nanodlm.storage import briefly
from nanodlm.store import Store, fingerprint_of

MOUNT = "/store"  # where `Launch.store_volume` lies in a pod
PORT = 4321  # of the first pod, on which the others find it
WAIT_SECONDS = 600  # for the other tasks of a Slurm job to end after the first has
LOOK_SECONDS = 2.0  # between looks into the store
ASK_SECONDS = 15.0  # between questions to the scheduler
SETTLE_SECONDS = 60.0  # for a finished job's manifest to be seen here: a shared disk may be late
LONGEST = 120_000  # bytes of a configuration: Linux takes no word above 128 KiB
SILENT_SECONDS = 1800.0  # for which a scheduler may leave questions unanswered
NAME = r"^[A-Za-z0-9]([A-Za-z0-9_.,-]*[A-Za-z0-9])?$|^$"
K8S_NAME = r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$|^$"
WAITING = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING"}
WAITING |= {"REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD", "STAGE_OUT", "REVOKED"}


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


def jobset(
    config: Config, store_url: str, launch: Launch, rebuild: bool = False, *, stage: str = "train"
) -> dict[str, Any]:
    """A manifest of a Kubernetes JobSet (jobset.x-k8s.io/v1alpha2): one pod for each host, which has all its GPUs.

    When a pod ends with 75 or is evicted, all are made anew, as often as it takes, and go on from the last checkpoint;
    after other failures as well, `launch.restarts` times. Secrets come from a Secret by its name.

    Args:
        config: The run's configuration, which the manifest holds.
        store_url: A bucket, or for several hosts a folder of the shared volume.
        launch: The hosts.
        rebuild: Whether to build even when the artifact exists.
        stage: train, evaluate or sample.

    Raises:
        UsageError: When the pods would not all see the store, or the text that is trained on.

    >>> pods = jobset(Config(), "s3://bucket/store", Launch(target="k8s", image="nanodlm:1"))
    >>> pods["kind"], pods["spec"]["failurePolicy"]["maxRestarts"]
    ('JobSet', 3)
    """
    place, nodes = _place(stage, store_url, launch), _nodes(stage, launch)
    name = _job_name(stage, config, place, rebuild)
    for source in config.data.source:
        if source != "sotu" and "://" not in source and not (launch.store_volume and source.startswith(f"{MOUNT}/")):
            raise UsageError(f"no pod sees the file {source}: give --data.source a URL, or a path below {MOUNT}")
    env: list[dict[str, Any]] = [{"name": "NANODLM_CACHE", "value": "/cache"}]
    if nodes > 1:
        index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
        env += [
            {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{name}-{stage}-0-0.{name}:{PORT}"},
            {"name": "JAX_NUM_PROCESSES", "value": str(nodes)},
            {"name": "JAX_PROCESS_ID", "valueFrom": index},
        ]
    gpus = {"nvidia.com/gpu": str(launch.gpus_per_node)} if launch.gpus_per_node else {}
    cpu = {"cpu": str(launch.cpus_per_task)} if launch.cpus_per_task else {}
    memory = {"memory": f"{launch.memory_gb}G"} if launch.memory_gb else {}
    volumes: list[dict[str, Any]] = [
        {"name": "cache", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},  # through which the GPUs of a host talk
    ]
    mounts = [{"name": "cache", "mountPath": "/cache"}, {"name": "shm", "mountPath": "/dev/shm"}]
    if launch.store_volume:
        volumes.append({"name": "store", "persistentVolumeClaim": {"claimName": launch.store_volume}})
        mounts.append({"name": "store", "mountPath": MOUNT})
    settings = _argument(config.model_dump_json().replace("$", "$$"))  # else $(NAME) would be looked up
    container = {
        "name": stage,
        "image": launch.image,
        "command": ["python", "-m", "nanodlm", stage],
        "args": [settings, "--store", place, *(["--rebuild"] if rebuild else [])],
        "env": env,
        **({"envFrom": [{"secretRef": {"name": launch.secret}}]} if launch.secret else {}),
        "ports": [{"name": "coordinator", "containerPort": PORT}],
        "resources": {"requests": {**cpu, **memory, **gpus}, "limits": {**memory, **gpus}},
        "volumeMounts": mounts,
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": launch.grace_seconds,
        "automountServiceAccountToken": bool(launch.service_account),
        **({"serviceAccountName": launch.service_account} if launch.service_account else {}),
        "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000},
        **({"tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}]} if gpus else {}),
        "containers": [container],
        "volumes": volumes,
    }
    saved = {"containerName": stage, "operator": "In", "values": [Stopped.exit_code]}
    job = {
        "completionMode": "Indexed",
        "completions": nodes,
        "parallelism": nodes,
        "backoffLimit": 0,  # one that fails is no use to the others: all begin anew
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": saved},
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"spec": pod},
    }
    passed = {
        "name": "stopped",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": name,
            **({"namespace": launch.namespace} if launch.namespace else {}),
            **({"labels": {"kueue.x-k8s.io/queue-name": launch.queue}} if launch.queue else {}),
        },
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": launch.restarts, "rules": [passed]},
            "ttlSecondsAfterFinished": 7 * 24 * 3600,
            "replicatedJobs": [{"name": stage, "replicas": 1, "template": {"spec": job}}],
        },
    }


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


def run_stage(
    name: str,
    config: Config,
    store_url: str,
    launch: Launch,
    *,
    rebuild: bool = False,
    emit: Callable[..., None] = lambda *_, **__: None,
) -> bool:
    """Run one stage on its target until its artifact is in the store, like `launch.run_stage`.

    A job is followed through the store: what `emit` is called with is a few seconds old. When this is interrupted, the
    job is cancelled; it saves, and the next run goes on where it was. When this is killed the job goes on, and the next
    call follows it.

    Args:
        name: train, evaluate or sample.
        config: The run's configuration.
        store_url: Where artifacts lie, for this process and for the job's hosts.
        launch: The target.
        rebuild: Build even when the artifact exists.
        emit: Called with the stage's events.

    Returns:
        Whether it ran, or False where the artifact was there.

    Raises:
        NanodlmError: When an input is not in the store, or the scheduler refuses the job, or it fails or is cancelled.
    """
    if launch.target == "process":
        here.run_stage(name, config, store_url, rebuild=rebuild, emit=emit)
        return True
    store = Store(store_url)
    lookup, _ = stages.ready(name, config, store, rebuild=rebuild)
    assert lookup.fingerprint is not None
    if lookup.artifact and not rebuild:
        return False
    job = submit(name, config, store_url, launch, rebuild=rebuild)
    try:
        emit("message", text=str(job))
        _follow(job, store, name, lookup.fingerprint, rebuild, emit)
    except _Ended:
        raise
    except BaseException:
        job.cancel()
        raise
    return True


class _Ended(NanodlmError):
    """The job ended without its artifact."""


def _follow(job: Job, store: Store, name: str, fingerprint: str, rebuild: bool, emit: Callable[..., None]) -> None:
    """Emit what the job tells through the store, until its artifact is there."""
    shown: dict[str, Any] = {}
    asked, answered, done = time.monotonic(), time.monotonic(), 0.0
    while True:
        try:
            with briefly(LOOK_SECONDS):
                for kind, fields in store.events(name, fingerprint).items():
                    if shown.get(kind) != fields:
                        shown[kind] = fields
                        emit(kind, **fields)
                if (done or not rebuild) and store.find(name, fingerprint):
                    return
        except Unreachable:  # the job may reach it nevertheless
            pass
        now = time.monotonic()
        if done and now - done > SETTLE_SECONDS:
            raise _Ended(f"{job.target} job {job.name} ended without a {name} artifact in {store.uri()}: {job.hint}")
        if not done and now - asked > ASK_SECONDS:
            asked = now
            state, words = job.state()
            if state == "failed" and not (not rebuild and store.find(name, fingerprint)):
                raise _Ended(f"{job.target} job {job.name} did not finish: {words}; run again to continue")
            if state != "unknown":
                answered = now
            elif now - answered > SILENT_SECONDS:
                raise NanodlmError(f"nobody tells how {job.target} job {job.name} stands ({words}): {job.hint}")
            if state in ("done", "failed"):
                done = now
        time.sleep(LOOK_SECONDS)


def _run(command: list[str], text: str = "", seconds: float = 60) -> tuple[int, str, str]:
    """Run a program: its exit code, what it said, and its errors; 127 when it is not there, 124 when it hangs."""
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=seconds)
    except FileNotFoundError:
        return 127, "", f"{command[0]} is not there"
    except PermissionError:
        return 126, "", f"{command[0]} may not be run"
    except subprocess.TimeoutExpired:
        return 124, "", f"{command[0]} did not answer within {seconds:.0f} s"
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def _told(program: str, arguments: list[str], text: str, remedy: str) -> str:
    """What a scheduler's program says to a job.

    Raises:
        NanodlmError: When it is not there, or refuses.
    """
    code, said, error = _run([program, *arguments], text)
    if code == 127 and not said:
        raise NanodlmError(f"there is no program {program} here: {remedy}, or print the job with --dry-run")
    if code:
        raise NanodlmError(f"{program} did not take the job: {_last(error) or f'exit code {code}'}")
    return said


def _last(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]
