"""Following a job of a cluster until the store holds what it makes."""

import time
from collections.abc import Callable
from typing import Any

from nanodlm.cluster.jobs import Job, submit
from nanodlm.cluster.settings import LOOK_SECONDS, Launch
from nanodlm.config import Config
from nanodlm.errors import NanodlmError, Unreachable
from nanodlm.stages.lookup import ready
from nanodlm.stages.process import run_in_process
from nanodlm.store import Store, lease_events
from nanodlm.store.retry import retrying_for

ASK_SECONDS = 15.0  # between questions to the scheduler
SETTLE_SECONDS = 60.0  # for a finished job's manifest to be seen here: a shared disk may be late
SILENT_SECONDS = 1800.0  # for which a scheduler may leave questions unanswered


def run_on_cluster(
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
        run_in_process(name, config, store_url, rebuild=rebuild, emit=emit)
        return True
    store = Store(store_url)
    lookup, _ = ready(name, config, store, rebuild=rebuild)
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
            with retrying_for(LOOK_SECONDS):
                for kind, fields in lease_events(store, name, fingerprint).items():
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
