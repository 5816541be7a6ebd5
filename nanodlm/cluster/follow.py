"""Handing a stage to a scheduler, and following its job until the store holds what it makes."""

import contextlib
import time
from typing import Any

from nanodlm.cluster import kubernetes, slurm
from nanodlm.cluster.settings import LOOK_SECONDS, Job, Launch, Work
from nanodlm.config import Config
from nanodlm.errors import NanodlmError, Unreachable
from nanodlm.stages.lookup import Lookup
from nanodlm.stages.progress import Emit
from nanodlm.store import Artifact, Store, lease_events
from nanodlm.store.retry import retrying_for

ASK_SECONDS = 15.0  # between questions to the scheduler
SETTLE_SECONDS = 60.0  # for a finished job's manifest to be seen here: a shared disk may be late
SILENT_SECONDS = 1800.0  # for which a scheduler may leave questions unanswered
SCHEDULERS: dict[str, Any] = {"slurm": slurm, "k8s": kubernetes}


def run_on_cluster(
    lookup: Lookup,
    config: Config,
    store: Store,
    launch: Launch,
    *,
    rebuild: bool = False,
    emit: Emit = lambda *_, **__: None,
) -> Artifact:
    """Build a stage as a job of a cluster, and return its artifact.

    The job is followed through the store: what `emit` is called with is a few seconds old. When this is interrupted,
    the job is cancelled; it saves, and the next run goes on where it was. When this is killed the job goes on, and the
    next call follows it.

    Args:
        lookup: The stage, which is train, evaluate or sample, and the artifacts it reads.
        config: The run's configuration.
        store: Where artifacts lie, for this process and for the job's hosts.
        launch: The cluster.
        rebuild: Build even when the artifact exists.
        emit: Called with the stage's events.

    Raises:
        NanodlmError: When the scheduler refuses the job, or it fails or is cancelled.
    """
    work = Work(config, store.uri(), launch, lookup.stage.name, lookup.input_fingerprints, rebuild)
    scheduler = SCHEDULERS[launch.target]
    job = scheduler.submit(work)
    try:
        emit("message", text=str(job))
        return _follow(job, lookup, store, rebuild, emit)
    except _Ended:
        raise
    except BaseException:
        scheduler.cancel(job)
        raise


class _Ended(NanodlmError):
    """The job ended without its artifact."""


def _follow(job: Job, lookup: Lookup, store: Store, rebuild: bool, emit: Emit) -> Artifact:
    """Emit what the job's lease in the store tells, until its artifact is there."""
    address, shown = (lookup.stage.name, lookup.fingerprint), {}
    label = f"{job.launch.target} job {job.name}"
    asked = answered = time.monotonic()
    ended = None
    while True:
        with contextlib.suppress(Unreachable), retrying_for(LOOK_SECONDS):  # the job may reach it nevertheless
            for kind, fields in lease_events(store, *address).items():
                if shown.get(kind) != fields:
                    shown[kind] = fields
                    emit(kind, **fields)
            if (ended or not rebuild) and (artifact := store.find(*address)):
                return artifact
        now = time.monotonic()
        if ended and now - ended > SETTLE_SECONDS:
            raise _Ended(f"{label} ended without a {address[0]} artifact in {store.uri()}: {job.hint}")
        if not ended and now - asked > ASK_SECONDS:
            asked = now
            state, words = SCHEDULERS[job.launch.target].state(job)
            if state == "failed" and (rebuild or not store.find(*address)):
                raise _Ended(f"{label} did not finish: {words}; run again to continue")
            if state in ("done", "failed"):
                ended = now
            if state != "unknown":
                answered = now
            elif now - answered > SILENT_SECONDS:
                raise NanodlmError(f"nobody tells how {label} stands ({words}): {job.hint}")
        time.sleep(LOOK_SECONDS)
