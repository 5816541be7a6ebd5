"""The lease that lets one of many simultaneous runs build while the others wait."""

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator

from nanodlm.errors import Damaged, Emit, NanodlmError, silent
from nanodlm.store.manifest import Json
from nanodlm.store.owner import has_ended, this_process
from nanodlm.store.retry import retrying_for
from nanodlm.store.store import Store

LEASE_SECONDS = 15.0  # an unchanged lease this old belongs to a dead run
BEAT_PATIENCE = 5.0  # a request for a lease is tried again for so long: the next beat does the same
SETTLE_SECONDS = 1.0  # of two runs that take a dead one's lease over, the later to write it has it


@contextlib.contextmanager
def hold_lease(
    store: Store, stage: str, fingerprint: str, emit: Emit = silent, inputs: dict[str, str] | None = None
) -> Iterator[Json]:
    """Hold the artifact's lease, waiting first while another run does, so that not both build it.

    Ages are measured by this process's own clock. A lease that stopped changing (of a paused process) is taken over
    after `LEASE_SECONDS`, and then lost to its holder; nothing rests on it. Collections keep what is read meanwhile,
    the fingerprints of `inputs` by stage. What is yielded is what the lease says: others read its `events` from the
    next beat on.
    """
    holder: Json = {"holder": secrets.token_hex(8), "host": socket.gethostname(), "pid": os.getpid()}
    holder |= {"process": this_process(), "inputs": inputs or {}, "events": {}, "beat": 0}
    path = store.path(stage, fingerprint, "lease.json")

    def is_held() -> bool:
        return (read_lease(store, path) or {}).get("holder") == holder["holder"]

    with store.beginning():  # before any work, so that a store that cannot be written says so at once
        while not store.write_json(path, holder, create_only=True):
            if _wait_for_lease(store, path, emit):
                store.write_json(path, holder)
                time.sleep(SETTLE_SECONDS)
                if is_held():
                    break
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(LEASE_SECONDS / 3):
            holder["beat"] += 1
            with retrying_for(BEAT_PATIENCE), contextlib.suppress(OSError, NanodlmError):
                if not is_held():
                    return  # taken over while this process stood still
                store.write_json(path, holder)

    thread = threading.Thread(target=beat, name="lease", daemon=True)
    thread.start()
    try:
        yield holder
    finally:
        stop.set()
        thread.join()
        with retrying_for(BEAT_PATIENCE), contextlib.suppress(OSError, NanodlmError):
            if is_held():
                store.remove(path)


def read_lease(store: Store, path: str) -> Json | None:
    """Return what the lease at a path says: nothing when it is torn, None when there is none."""
    with contextlib.suppress(Damaged):
        if isinstance(held := store.read_json(path), dict | None):
            return held
    return {}


def lease_events(store: Store, stage: str, fingerprint: str) -> dict[str, Json]:
    """Return the latest events, by kind, of whoever is building an artifact; none where nobody is."""
    return (read_lease(store, store.path(stage, fingerprint, "lease.json")) or {}).get("events", {})


def _wait_for_lease(store: Store, path: str, emit: Emit) -> bool:
    """Wait while a live run holds the lease, and say if a dead one's is left to be taken over."""
    seen, since = read_lease(store, path), time.monotonic()
    if seen:
        emit("message", text=f"process {seen.get('pid')} on {seen.get('host')} is building it; waiting")
    while seen:
        if has_ended(str(seen.get("process"))):
            return True
        time.sleep(0.2 if store.is_local else 0.5)
        now = read_lease(store, path)
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > LEASE_SECONDS:
            return True
    return seen is not None
