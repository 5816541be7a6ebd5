"""A place of a Prefect concurrency limit: waited for, held while a device is used, and given back.

Prefect's own `concurrency` waits in a thread, which may take a place after its run was cancelled, and gives up a place
when the server is away for some seconds as it is renewed. Here the run itself waits, and renews as long as it holds.
"""

import shlex
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from nanodlm.errors import NanodlmError

FIRST_SECONDS = 60.0  # of a lease at first, the least that Prefect allows: a run may be killed before it knows of it
LEASE_SECONDS = 900.0  # for which the server may be away, or a place stay taken after its holder's computer is lost
RENEW_SECONDS = 30.0  # between renewals
ASK_SECONDS = 3.0  # between requests for a place
SAY_SECONDS = 60.0  # between lines that say that it waits
JOIN_SECONDS = 5.0  # for a renewal that is under way when the place is given back
BUSY = (httpx.codes.REQUEST_TIMEOUT, httpx.codes.TOO_MANY_REQUESTS)


@contextmanager
def place(limit: str, emit: Callable[..., None]) -> Iterator[None]:
    """Hold a place of a limit. When it is lost it is asked for again, and its holder goes on meanwhile.

    Args:
        limit: Name of a global concurrency limit.
        emit: Called as `emit("message", text=...)` with what takes long or goes wrong.

    Raises:
        NanodlmError: When the server has no such limit, or refuses.
    """
    emit("message", text=f"asking for a place of the concurrency limit {limit}")
    held: list[UUID] = []
    done = threading.Event()
    with get_client(sync_client=True) as client:
        settings = copy_context()  # which name the server
        keeper = threading.Thread(target=settings.run, args=(_keep, limit, held, done, emit), daemon=True)
        try:
            held.append(_wait(client, limit, emit))
            keeper.start()
            yield
        finally:
            done.set()
            if keeper.is_alive():
                keeper.join(JOIN_SECONDS)
            if held:
                _give_back(client, held[-1], limit, emit)


def _wait(client: SyncPrefectClient, limit: str, emit: Callable[..., None]) -> UUID:
    """The lease of a place, once there is one. It is asked for in this thread, for an exception to end it."""
    spoken, guarded = time.monotonic(), True
    while True:
        try:
            with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):  # else the client would sleep for minutes
                found = client.read_global_concurrency_limit_by_name(limit)
                if found.name != limit:  # the name is part of an address there, and `gpu/` asks for `gpu`
                    raise _no_such(limit)
                if guarded and not found.active:
                    guarded = False
                    emit("message", text=f"the concurrency limit {limit} is switched off, and guards nothing")
                if lease := _take(client, limit):
                    return lease
        except (ObjectNotFound, httpx.InvalidURL) as error:
            raise _no_such(limit) from error
        except httpx.HTTPStatusError as error:
            if not (error.response.is_server_error or error.response.status_code in BUSY):
                said = " ".join(error.response.text.split())[:200]
                raise NanodlmError(f"the Prefect server gives no place of {limit}: {said}") from error
        except httpx.TransportError:  # the server is away
            pass
        if time.monotonic() - spoken > SAY_SECONDS:
            spoken = time.monotonic()
            emit("message", text=f"waiting for a place of the concurrency limit {limit}")
        time.sleep(ASK_SECONDS)


def _no_such(limit: str) -> NanodlmError:
    return NanodlmError(
        f"the Prefect server has no concurrency limit {limit!r}: run `prefect gcl create {shlex.quote(limit)} --limit "
        "1`, or correct gpu_limit"
    )


def _take(client: SyncPrefectClient, limit: str) -> UUID | None:
    """The lease of a place, or None when all are taken."""
    try:
        answer = client.increment_concurrency_slots_with_lease([limit], 1, "concurrency", FIRST_SECONDS)
    except httpx.HTTPStatusError as error:
        if error.response.status_code == httpx.codes.LOCKED:
            return None
        raise
    lease = UUID(answer.json()["lease_id"])
    try:
        return lease if _renewed(client, lease) else None
    except BaseException:
        with suppress(Exception):
            client.release_concurrency_slots_with_lease(lease)
        raise


def _keep(limit: str, held: list[UUID], done: threading.Event, emit: Callable[..., None]) -> None:
    """Renew the last lease of `held`, and add another when the server has forgotten it."""
    lost = False
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), get_client(sync_client=True) as client:
        while not done.wait(RENEW_SECONDS):
            with suppress(Exception):  # whatever the server or the network make of it: the next try may do better
                if not lost:
                    lost = not _renewed(client, held[-1])
                    if lost and not done.is_set():
                        emit("message", text=f"the server has forgotten who holds {limit}: going on, and asking again")
                if lost and not done.is_set() and (lease := _take(client, limit)):
                    held.append(lease)
                    lost = False
                    if done.is_set():  # the holder has left meanwhile
                        client.release_concurrency_slots_with_lease(lease)


def _give_back(client: SyncPrefectClient, lease: UUID, limit: str, emit: Callable[..., None]) -> None:
    try:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 3}):
            client.release_concurrency_slots_with_lease(lease)
    except Exception as error:  # a result must not be lost because the server is away
        emit("message", text=f"a place of {limit} is free when its lease ends: {type(error).__name__}")


def _renewed(client: SyncPrefectClient, lease: UUID) -> bool:
    try:
        client.renew_concurrency_lease(lease, LEASE_SECONDS)
    except httpx.HTTPStatusError as error:
        if error.response.status_code == httpx.codes.GONE:
            return False
        raise
    return True
