"""Kubernetes: the JobSet of a job, creating it, and asking how it stands."""

import json
import os
from typing import Any

import yaml

from nanodlm.cluster.settings import MOUNT, PORT, Job, Work, answer_of, ask
from nanodlm.errors import Stopped
from nanodlm.stages.process import last_line
from nanodlm.store import FLOW_RUN

# A JobSet is deleted once its pods have gone: another by the same name would take them for its own.
ONCE_GONE = ("--ignore-not-found", "--cascade=foreground")


def jobset(work: Work) -> dict[str, Any]:
    """Write a manifest of a Kubernetes JobSet (jobset.x-k8s.io/v1alpha2): a pod for each host, which has all its GPUs.

    When a pod ends with 75 or is evicted, all are made anew, as often as it takes, and go on from the last checkpoint;
    after other failures as well, three times. Secrets come from a Secret by its name.
    """
    launch, stage, name, nodes = work.launch, work.stage, work.name, work.nodes
    env: list[dict[str, Any]] = []
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
    shared = {"name": "shm", "emptyDir": {"medium": "Memory"}}  # through which the GPUs of a host talk
    volumes: dict[str, Any] = {"/dev/shm": shared}
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
        "resources": {"limits": gpus},
        "volumeMounts": [{"name": volume["name"], "mountPath": path} for path, volume in volumes.items()],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": launch.grace_seconds,
        "automountServiceAccountToken": False,
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
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name},
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": 3, "rules": [{"name": "stopped", **passed}]},
            "ttlSecondsAfterFinished": 7 * 24 * 3600,
            "replicatedJobs": [{"name": stage, "replicas": 1, "template": {"spec": job}}],
        },
    }


def job_text(work: Work) -> str:
    """Write the manifest of `jobset` for a person to read, as YAML."""
    return yaml.safe_dump(jobset(work), sort_keys=False, width=1000)


def submit(work: Work) -> Job:
    """Create a JobSet, unless one for the same work waits or runs; one that has ended goes first."""
    name, manifest = work.name, json.dumps(jobset(work))
    there = ask("kubectl", "get", "jobset", name)[0] == 0
    found = there and ended(name) is None
    if there and not found:  # it keeps its name for a week
        answer_of("kubectl", "delete", "jobset", name, *ONCE_GONE, seconds=work.launch.grace_seconds + 60)
    if not found:
        answer_of("kubectl", "create", "--filename=-", text=manifest)
    return Job(name, f"kubectl get jobset {name}", found)


def ended(name: str) -> str | None:
    """Say why a JobSet did not finish, nothing if it did; None while it waits or runs, or nobody answers."""
    code, answer, error = ask("kubectl", "get", "jobset", name, "--output=json")
    if code:
        return "it has been deleted" if "NotFound" in error else None
    found = json.loads(answer)
    if "deletionTimestamp" in found["metadata"]:
        return "it is being deleted"
    conditions = found.get("status", {}).get("conditions", [])
    holds = {condition["type"]: condition["message"] for condition in conditions if condition["status"] == "True"}
    if "Failed" not in holds:
        return "" if "Completed" in holds else None
    _, log, _ = ask("kubectl", "logs", f"--selector=jobset.sigs.k8s.io/jobset-name={name}", "--tail=1")
    return last_line(log) or holds["Failed"]


def cancel(name: str) -> None:
    """End a JobSet, if it has not ended; it saves first. That the cluster cannot be asked is not an error."""
    ask("kubectl", "delete", "jobset", name, *ONCE_GONE, "--wait=false")
