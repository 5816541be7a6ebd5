"""Handing a stage to a scheduler, and following its job until the store holds what it makes."""

import contextlib
import time
from typing import Any

from nanodlm.cluster import kubernetes, slurm
from nanodlm.cluster.settings import LOOK_SECONDS, Launch, Work
from nanodlm.config import Config
from nanodlm.errors import Emit, NanodlmError, Unreachable, silent
from nanodlm.stages.lookup import Lookup
from nanodlm.store import Artifact, Store, lease_events
from nanodlm.store.retry import retrying_for

ASK_SECONDS = 15.0  # between questions to the scheduler
SETTLE_SECONDS = 60.0  # for a finished job's manifest to be seen here: a shared disk may be late
SCHEDULERS: dict[str, Any] = {"slurm": slurm, "k8s": kubernetes}


def run_on_cluster(
    lookup: Lookup, config: Config, store: Store, launch: Launch, *, rebuild: bool = False, emit: Emit = silent
) -> Artifact:
    """Build a stage that uses JAX as a job of a cluster, and return its artifact.

    What `emit` is called with comes through the store. When this is interrupted, the job is cancelled; it saves, and
    the next run goes on where it was. When this is killed the job goes on, and the next call follows it.
    """
    scheduler, address, shown = SCHEDULERS[launch.target], (lookup.stage.folder, lookup.fingerprint), {}
    config = lookup.stage.of(config)
    job = scheduler.submit(Work(config, store.uri(), launch, address[0], lookup.input_fingerprints, rebuild))
    asked, ended = time.monotonic(), None
    try:
        emit("message", text=str(job))
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
                raise NanodlmError(f"job {job.name} ended without a {address[0]} artifact in {store.uri()}: {job.hint}")
            if not ended and now - asked > ASK_SECONDS:
                asked, failure = now, scheduler.ended(job.name)
                ended = None if failure is None else now
                if failure and (rebuild or not store.find(*address)):
                    raise NanodlmError(f"job {job.name} did not finish: {failure}; run again to continue")
            time.sleep(LOOK_SECONDS)
    except BaseException:
        if not ended:
            scheduler.cancel(job.name)
        raise
