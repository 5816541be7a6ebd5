"""The run that a flow works for: on a real server, which somebody else tells that the run is over."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prefect import flow, get_client, task
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Cancelling, Crashed, Suspended

from nanodlm.errors import NanodlmError, UsageError
from nanodlm.flows import own_run
from nanodlm.flows.own_run import built_before, working_for_run
from nanodlm.flows.pipeline import pipeline
from nanodlm.stages.run import enter_folder
from nanodlm.store import FLOW_RUN
from tests.support.servers import Quiet, free_ports, serving


@pytest.fixture
def client(prefect_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[SyncPrefectClient]:
    monkeypatch.setattr(own_run, "LOOK_SECONDS", 0.2)
    named = temporary_settings({PREFECT_API_URL: prefect_server["PREFECT_API_URL"]})
    with named, get_client(sync_client=True) as found:
        yield found


def end(how: Callable[[str], Any]) -> tuple[str, str, float]:
    """Run a flow that works for a minute, and have its run ended; return its id, what was raised, and the seconds."""
    ids, began = [], time.monotonic()

    @flow
    def working() -> None:
        with working_for_run():
            ids.append(flow_run.id)
            assert os.environ[FLOW_RUN] == ids[0]
            threading.Timer(0.3, how, ids).start()
            time.sleep(60)

    with pytest.raises(BaseException) as raised:
        working()
    assert not isinstance(raised.value, Exception)  # so that no state is proposed
    assert FLOW_RUN not in os.environ
    return ids[0], str(raised.value), time.monotonic() - began


@pytest.mark.parametrize(
    ("told", "name"),
    [
        (Cancelling(), "Cancelled"),
        (Cancelled(), "Cancelled"),
        (Suspended(timeout_seconds=600), "Suspended"),
        (Crashed(), "Crashed"),
    ],
    ids=lambda value: value.name.lower() if hasattr(value, "name") else "",
)
def test_a_run_stops_when_its_server_says_that_it_is_over_and_leaves_the_state(
    client: SyncPrefectClient, told: Any, name: str
) -> None:
    run, said, seconds = end(lambda run: client.set_flow_run_state(run, told, force=True))
    assert seconds < 30
    assert said == f"the run is {told.name}; what is finished and saved is kept"
    state = client.read_flow_run(run).state
    assert state is not None
    assert state.name == name


def test_a_run_that_was_deleted_stops(client: SyncPrefectClient) -> None:
    _, said, _ = end(lambda run: client.delete_flow_run(run))
    assert said.startswith("the run is Deleted")


def test_a_run_goes_on_while_its_server_is_away(client: SyncPrefectClient) -> None:
    @flow
    def working() -> str:
        with working_for_run():
            time.sleep(0.7)
        away = temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{free_ports(1)[0]}/api"})
        with away, working_for_run():
            time.sleep(0.7)
        return "done"

    before = signal.getsignal(signal.SIGUSR1)
    assert working() == "done"
    assert signal.getsignal(signal.SIGUSR1) == before


@contextmanager
def proxy(status: int, body: bytes) -> Iterator[str]:
    """The API's address of something that stands before a server and has lost it."""

    class Handler(Quiet):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

    with serving(Handler) as address:
        yield f"{address}/api"


@pytest.mark.parametrize(("status", "body"), [(404, b"no such page"), (200, b"<html>back soon"), (503, b"")])
def test_a_proxy_that_has_lost_the_server_ends_no_run(status: int, body: bytes) -> None:
    with proxy(status, body) as url, temporary_settings({PREFECT_API_URL: url}):
        assert own_run._end_of("6ccd8cf3-d434-42ee-a3c1-1fa4c13dfed0") == ""


def test_a_stop_that_was_seen_is_not_forgotten_and_one_that_comes_late_hurts_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = iter(["Suspended"])
    monkeypatch.setattr(own_run, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(own_run, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(own_run, "_end_of", lambda _: next(answers, ""))
    with pytest.raises(BaseException, match="the run is Suspended") as raised, working_for_run():
        time.sleep(20)
    assert not isinstance(raised.value, Exception)
    monkeypatch.setattr(own_run, "_end_of", lambda _: time.sleep(0.3) or "Cancelled")
    with working_for_run():
        time.sleep(0.1)  # the look is under way
    time.sleep(0.5)  # a signal that came now would end this process


def test_a_limit_that_is_switched_off_is_not_waited_for(client: SyncPrefectClient) -> None:
    held: list[str] = []

    @flow
    def working() -> None:
        with own_run.hold_device("switched-off", lambda *_, **__: held.append("waits")):
            held.append("works")

    body = GlobalConcurrencyLimitCreate(name="switched-off", limit=1, active_slots=1, active=False)
    client.create_global_concurrency_limit(body)
    working()
    assert held == ["works"]


def test_only_a_run_that_is_tried_again_knows_stages_that_it_has_built(client: SyncPrefectClient) -> None:
    known: list[set[str]] = []

    @task(task_run_name="train")
    def train() -> None:
        pass

    @flow
    def twice() -> None:
        known.append(built_before())
        if len(known) == 1:
            train()
            deadline = time.monotonic() + 20
            with get_client(sync_client=True) as client:
                while "Completed" not in {run.state_name for run in client.read_task_runs(limit=1)}:
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
            raise ValueError("the first try fails")

    twice.with_options(retries=1)()
    assert known == [set(), {"train"}]


def test_a_deployment_whose_clone_was_moved_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANODLM_FOLDER", str(tmp_path / "moved"))
    with pytest.raises(UsageError, match=r"moved, from where this was deployed, cannot be entered .*deploy --all"):
        enter_folder()


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"until": "shard", "rebuild": "train"}, "comes after --until shard: nothing would be rebuilt"),
        ({"rebuild": "judge"}, "this run has none: set --sample.judge twin"),
        ({"config": {"train": {"max_steps": 0}}}, "train.max_steps: Input should be greater than or equal to 1"),
        ({"store": "s3://key:planted-secret@bucket/store"}, "holds a user name or password"),
    ],
)
def test_what_a_flow_refuses_is_one_line_without_a_traceback_and_without_secrets(
    client: SyncPrefectClient, parameters: dict[str, Any], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(NanodlmError, match=says):
        pipeline(**parameters)
    run = client.read_flow_runs(sort="EXPECTED_START_TIME_DESC", limit=1)[0]  # type: ignore[arg-type]
    assert run.state is not None
    assert run.state.name == "Failed"
    assert says in str(run.state.message)
    told = f"{run.state.message} {caplog.text}"
    assert "Traceback" not in told
    assert "planted-secret" not in told
