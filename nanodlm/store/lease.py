"""The lease that lets one of many simultaneous runs build while the others wait."""

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from nanodlm.errors import NanodlmError
from nanodlm.store.attempt import cannot_write
from nanodlm.store.retry import retrying_for
from nanodlm.store.store import Store

LEASE_SECONDS = 15.0  # an unchanged lease this old belongs to a dead run
BEAT_PATIENCE = 5.0  # a request for a lease is tried again for so long: the next beat does the same
SETTLE_SECONDS = 1.0  # of two runs that take a dead one's lease over, the later to write it has it


@contextlib.contextmanager
def hold_lease(
    store: Store,
    stage: str,
    fingerprint: str,
    notify: Callable[[str], None] = lambda _: None,
    inputs: dict[str, str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Hold the artifact's lease, waiting first while another run does, so that not both build it.

    Ages are measured by this process's own clock, so clocks that differ cannot mislead it. One that stopped (a
    paused process) is taken over after `LEASE_SECONDS`, and then lost to its holder; nothing rests on it.

    Args:
        store: Where the artifact will lie.
        stage: The artifact's stage.
        fingerprint: Its fingerprint.
        notify: Told, in words, who is being waited for.
        inputs: Fingerprints, by stage, of what is read meanwhile, which a collection then keeps.

    Yields:
        What the lease says of this holder. What it puts under `events` is there for others to read from the next
        beat on; see `lease_events`.

    Raises:
        NanodlmError: When the store cannot be written.
    """
    path = store.path(stage, fingerprint, "lease.json")
    mine: dict[str, Any] = {"holder": secrets.token_hex(8), "host": socket.gethostname(), "pid": os.getpid()}
    mine |= {"inputs": inputs or {}, "events": {}}
    try:  # before any work, so that a store that cannot be written says so at once
        while not store.write_json(path, {**mine, "beat": 0}, create_only=True):
            if not _wait_for_lease(store, path, notify):
                continue
            store.write_json(path, {**mine, "beat": 0})
            time.sleep(SETTLE_SECONDS)
            if _holder(store, path) == mine["holder"]:
                break
    except OSError as error:
        raise cannot_write(store, error) from error
    stop = threading.Event()

    def beat() -> None:
        count = 0
        while not stop.wait(LEASE_SECONDS / 3):
            count += 1
            with retrying_for(BEAT_PATIENCE), contextlib.suppress(OSError, NanodlmError):
                if _holder(store, path) != mine["holder"]:
                    return  # taken over while this process stood still
                store.write_json(path, {**mine, "beat": count})

    thread = threading.Thread(target=beat, name="lease", daemon=True)
    thread.start()
    try:
        yield mine
    finally:
        stop.set()
        thread.join()
        with (
            retrying_for(BEAT_PATIENCE),
            contextlib.suppress(OSError, NanodlmError),
        ):  # nobody waits for this to end
            if _holder(store, path) == mine["holder"]:
                store.remove(path)


def lease_events(store: Store, stage: str, fingerprint: str) -> dict[str, dict[str, Any]]:
    """The latest events, by kind, of whoever is building an artifact, as its lease tells; empty where nobody is."""
    held = store.read_json(store.path(stage, fingerprint, "lease.json"))
    events = held.get("events") if isinstance(held, dict) else None
    return {k: event for k, event in events.items() if isinstance(event, dict)} if isinstance(events, dict) else {}


def _holder(store: Store, path: str) -> str | None:
    held = store.read_json(path)
    return held.get("holder") if isinstance(held, dict) else None


def _wait_for_lease(store: Store, path: str, notify: Callable[[str], None]) -> bool:
    """Wait while a live run holds it. Whether a dead one's is left to be taken over."""
    seen, since = store.read_json(path), time.monotonic()
    if isinstance(seen, dict):
        notify(f"process {seen.get('pid')} on {seen.get('host')} is building it; waiting")
    while isinstance(seen, dict):
        if seen.get("host") == socket.gethostname() and not _alive(seen.get("pid")):
            return True
        time.sleep(0.2 if store.is_local else 0.5)
        now = store.read_json(path)
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > LEASE_SECONDS:
            return True
    return seen is not None


def _alive(pid: Any) -> bool:
    if type(pid) is not int or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
