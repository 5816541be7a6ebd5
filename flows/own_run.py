"""The flow run that this process works for: what it built before, its end, the device it waits for."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextvars import copy_context
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import State, StateType
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound
from prefect.runtime import deployment, flow_run
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Cancelled, Failed

from nanodlm.errors import Emit, NanodlmError, Stopped
from nanodlm.flows.internals import end_of_run
from nanodlm.store import FLOW_RUN

LOOK_SECONDS = 30.0  # between two looks whether the run is still wanted
PATIENCE_SECONDS = 150.0  # before it is stopped once more, for a library may have caught that; longer than a save takes
ASK_SECONDS = 3.0  # between two questions whether a device is free
LEASE_SECONDS = 900.0  # for which a slot stays taken after kill -9; the server may be away for a quarter of it


def built_before() -> set[str]:
    """Return the stages that earlier tries of this run have built: retried, it does not build them once more."""
    of_run = FlowRunFilter.model_validate({"id": {"any_": [flow_run.id]}})
    with get_client(sync_client=True) as client:
        return {run.name for run in client.read_task_runs(flow_run_filter=of_run) if run.state_name == "Completed"}


@contextlib.contextmanager
def working_for_run() -> Iterator[None]:
    """Name this run in all manifests that the block writes, and stop the block, saving, when the run is over."""
    run, ended, done, lock = flow_run.id, "", threading.Event(), threading.Lock()

    def look() -> None:
        nonlocal ended
        while not done.wait(PATIENCE_SECONDS if ended else LOOK_SECONDS):
            ended = _end_of(run) or ended
            with lock:
                if ended and not done.is_set():
                    signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)  # type: ignore[arg-type]

    def interrupt(*_: Any) -> None:
        raise Stopped(f"the run is {ended or 'stopped by a signal'}; what is finished and saved is kept")

    os.environ[FLOW_RUN] = str(run)
    before = signal.signal(signal.SIGUSR1, interrupt)
    threading.Thread(target=copy_context().run, args=(look,), name="own-run", daemon=True).start()
    try:
        try:
            yield
        finally:
            with lock:
                done.set()
    except Exception as error:
        ended = ended or _end_of(run)
        if not ended:
            raise
        state = _set_state(Cancelled(message=str(error))) if ended == "Cancelling" else None
        raise end_of_run(str(error), state) from error
    finally:
        os.environ.pop(FLOW_RUN, None)
        signal.signal(signal.SIGUSR1, before)


def _end_of(run: str | None) -> str:
    """Return how a run has ended for its server, such as `Cancelling` or `Deleted`; nothing while it goes on."""
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), get_client(sync_client=True) as client:
        try:
            state = client.read_flow_run(run).state  # type: ignore[arg-type]
        except ObjectNotFound:  # which a proxy without its server says of all
            return "" if client.api_healthcheck() else "Deleted"
        except Exception:  # whatever a server that is away, or a proxy before it, makes of the question
            return ""
    return "" if state is None or state.type in (StateType.RUNNING, StateType.PENDING) else state.name or "ended"


@contextlib.contextmanager
def hold_device(limit: str | None, emit: Emit) -> Iterator[None]:
    """Hold a slot of a concurrency limit, where the server has it. A run that has to wait for one says so."""
    lasting: dict[str, Any] = {"lease_duration": LEASE_SECONDS, "raise_on_lease_renewal_failure": False}
    with contextlib.ExitStack() as slot:
        said = False
        while limit:
            try:  # again and again: a request of Prefect's outlives the run that is cancelled, and may still get a slot
                slot.enter_context(concurrency(limit, max_retries=0, **lasting))
                break
            except ConcurrencySlotAcquisitionError:
                if not said:
                    emit("message", text=f"waiting for a slot of the concurrency limit {limit}")
                said = True
                time.sleep(ASK_SECONDS)
        yield


def fail(error: NanodlmError) -> State[Any]:
    """Return the state `Failed` with the one line of an error; a deployed flow is ended in it, without a traceback."""
    if deployment.id:
        raise end_of_run(str(error), _set_state(Failed(message=str(error)))) from error
    return Failed(message=str(error), data=error)


def _set_state(state: State[Any]) -> State[Any] | None:
    """Propose a state of this run, and return the one that the server took or has."""
    with get_client(sync_client=True) as client:
        return client.set_flow_run_state(flow_run.id, state).state  # type: ignore[arg-type]
