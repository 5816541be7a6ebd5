"""Kubernetes: the JobSet of a job, creating it, and asking how it stands."""

import json
import os
from dataclasses import replace
from typing import Any, Literal

import yaml

from nanodlm.cluster.settings import MOUNT, PORT, Job, Work, ask, hand_over
from nanodlm.errors import NanodlmError, Stopped
from nanodlm.stages.process import last_line
from nanodlm.store import FLOW_RUN

# A JobSet is deleted once its pods have gone: another by the same name would take them for its own.
ONCE_GONE = ("--ignore-not-found", "--cascade=foreground")


def jobset(work: Work) -> dict[str, Any]:
    """Write a manifest of a Kubernetes JobSet (jobset.x-k8s.io/v1alpha2): a pod for each host, which has all its GPUs.

    When a pod ends with 75 or is evicted, all are made anew, as often as it takes, and go on from the last checkpoint;
    after other failures as well, `launch.restarts` times. Secrets come from a Secret by its name.
    """
    launch, stage, name, nodes = work.launch, work.stage, work.name, work.nodes
    env: list[dict[str, Any]] = [{"name": "NANODLM_CACHE", "value": "/cache"}]
    if run := os.environ.get(FLOW_RUN):
        env.append({"name": FLOW_RUN, "value": run})
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
    volumes: dict[str, Any] = {"/cache": {"name": "cache", "emptyDir": {}}}
    volumes["/dev/shm"] = {"name": "shm", "emptyDir": {"medium": "Memory"}}  # through which the GPUs of a host talk
    if launch.store_volume:
        volumes[MOUNT] = {"name": "store", "persistentVolumeClaim": {"claimName": launch.store_volume}}
    settings = work.config.model_dump_json().replace("$", "$$")  # else $(NAME) would be looked up
    container = {
        "name": stage,
        "image": launch.image,
        "command": ["python", "-m", "nanodlm", stage],
        "args": [settings, *work.flags()],
        "env": env,
        **({"envFrom": [{"secretRef": {"name": launch.secret}}]} if launch.secret else {}),
        "ports": [{"name": "coordinator", "containerPort": PORT}],
        "resources": {"requests": {**cpu, **memory, **gpus}, "limits": {**memory, **gpus}},
        "volumeMounts": [{"name": volume["name"], "mountPath": path} for path, volume in volumes.items()],
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
        "volumes": list(volumes.values()),
    }
    saved = {"onExitCodes": {"containerName": stage, "operator": "In", "values": [Stopped.exit_code]}}
    evicted = {"onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    job = {
        "completionMode": "Indexed",
        "completions": nodes,
        "parallelism": nodes,
        "backoffLimit": 0,  # one that fails is no use to the others: all begin anew
        "podFailurePolicy": {"rules": [{"action": "FailJob", **when} for when in (saved, evicted)]},
        "template": {"spec": pod},
    }
    passed = {"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}
    namespace = {"namespace": launch.namespace} if launch.namespace else {}
    queue = {"labels": {"kueue.x-k8s.io/queue-name": launch.queue}} if launch.queue else {}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name, **namespace, **queue},
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": launch.restarts, "rules": [{"name": "stopped", **passed}]},
            "ttlSecondsAfterFinished": 7 * 24 * 3600,
            "replicatedJobs": [{"name": stage, "replicas": 1, "template": {"spec": job}}],
        },
    }


def job_text(work: Work) -> str:
    """Write the manifest of `jobset` for a person to read, as YAML."""
    return yaml.safe_dump(jobset(work), sort_keys=False, width=1000)


def submit(work: Work) -> Job:
    """Create a JobSet, unless one for the same work waits or runs; one that has ended goes first."""
    launch, manifest = work.launch, json.dumps(jobset(work))
    where = f" -n {launch.namespace}" if launch.namespace else ""
    job = Job(launch, work.name, f"kubectl get jobset {work.name}{where}")
    stands, _ = state(job)
    if stands == "waiting":
        return replace(job, found=True)
    if stands != "unknown":  # one that has ended keeps its name for a week
        code, _, error = _kubectl(job, "delete", "jobset", job.name, *ONCE_GONE, seconds=launch.grace_seconds + 60)
        if code:
            raise NanodlmError(f"the JobSet {job.name} has ended and does not go away: {last_line(error)}")
    hand_over(["kubectl", "create", "--filename=-"], manifest, "install it and give it a context for the cluster")
    return job


def state(job: Job) -> tuple[Literal["waiting", "done", "failed", "unknown"], str]:
    """Ask how a JobSet stands, and in words: `waiting` is queued or running, `unknown` is without an answer."""
    code, answer, error = _kubectl(job, "get", "jobset", job.name, "--output=json")
    if code and "NotFound" in error:
        return "failed", "it has been deleted"
    try:
        found = json.loads(answer)
    except ValueError:
        return "unknown", last_line(error)
    if found.get("metadata", {}).get("deletionTimestamp"):
        return "failed", "it is being deleted"
    status = found.get("status", {})
    ended = {c["type"]: c.get("message", "") for c in status.get("conditions", []) if c.get("status") == "True"}
    if "Completed" in (status.get("terminalState"), *ended):
        return "done", "Completed"
    if "Failed" in (status.get("terminalState"), *ended):
        _, log, _ = _kubectl(job, "logs", f"--selector=jobset.sigs.k8s.io/jobset-name={job.name}", "--tail=1")
        return "failed", last_line(log) or ended.get("Failed", "") or "it has failed"
    return "waiting", f"restarted {status.get('restarts', 0)} times"


def cancel(job: Job) -> None:
    """End a JobSet, if it has not ended; it saves first. That the cluster cannot be asked is not an error."""
    _kubectl(job, "delete", "jobset", job.name, *ONCE_GONE, "--wait=false")


def _kubectl(job: Job, *words: str, seconds: float = 60) -> tuple[int, str, str]:
    namespace = ["--namespace", job.launch.namespace] if job.launch.namespace else []
    return ask(["kubectl", *words, *namespace], seconds=seconds)
