"""The server of one run, one that is away, and what Prefect reads from the environment."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from nanodlm.errors import NanodlmError, Stopped
from nanodlm.flows import server
from nanodlm.flows.server import ephemeral_server, wait_for_server_at_end
from tests.flows.test_own_run import proxy
from tests.support.commands import environment
from tests.support.servers import free_ports


@pytest.fixture
def silent() -> str:
    """The address of a server that is away."""
    return f"http://127.0.0.1:{free_ports(1)[0]}/api"


@pytest.mark.parametrize("after", [0.3, 1.3])
def test_whoever_waits_for_a_server_is_stopped_by_a_signal_at_any_moment(after: float, silent: str) -> None:
    said: list[str] = []

    def stop(*_: object) -> None:
        raise Stopped("stopped by a signal")

    before = signal.signal(signal.SIGALRM, stop)
    try:
        with (
            temporary_settings({PREFECT_API_URL: silent}),
            pytest.raises(Stopped),
            wait_for_server_at_end(lambda _, text: said.append(text)),
        ):
            signal.setitimer(signal.ITIMER_REAL, after)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert said == ["the Prefect server is away: waiting to tell it how the stage ended"]


def test_a_server_that_stays_away_is_not_waited_for_for_ever(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "AWAY_SECONDS", 0.5)
    with (
        temporary_settings({PREFECT_API_URL: silent}),
        pytest.raises(ValueError, match="the stage's own error"),
        wait_for_server_at_end(lambda *_, **__: None),
    ):
        raise ValueError("the stage's own error")


def test_whatever_answers_with_no_error_of_its_own_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "AWAY_SECONDS", 30.0)
    with proxy(401, b"who are you?") as url, temporary_settings({PREFECT_API_URL: url}):
        began = time.monotonic()
        with wait_for_server_at_end(lambda *_, **__: None):
            pass
        assert time.monotonic() - began < 15


@pytest.mark.slow
def test_servers_that_start_at_once_on_a_new_database_all_come_up(tmp_path: Path) -> None:
    code = "from nanodlm.flows.server import ephemeral_server\nwith ephemeral_server() as url: print(url)"
    env = environment(PREFECT_HOME=str(tmp_path / "home"), PREFECT_API_URL="")
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    starting = [subprocess.Popen([sys.executable, "-c", code], env=env, **pipes) for _ in range(4)]
    said = [process.communicate(timeout=200) for process in starting]
    assert [process.returncode for process in starting] == [0] * 4, said
    assert len({out for out, _ in said}) == 4


def test_a_home_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    with (
        temporary_settings({PREFECT_HOME: tmp_path / "home"}),
        pytest.raises(NanodlmError, match=r"did not start \(.*home.*\); set PREFECT_API_URL to use a running one, or"),
        ephemeral_server(),
    ):
        pass


@pytest.mark.slow
def test_nobody_waits_for_a_server_of_their_own_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "operator:word")  # of others
    began = time.monotonic()
    with (
        pytest.raises(
            NanodlmError, match=r"the local Prefect server has failed in .*; what is finished is kept: run again"
        ),
        ephemeral_server() as url,
        temporary_settings({PREFECT_API_URL: url}),
        wait_for_server_at_end(lambda *_, **__: None),
    ):
        server.check_server()
        child = server.OWN.get()
        assert child is not None
        child.kill()
        child.wait()
        raise OSError("the request that this would have made fails")
    assert time.monotonic() - began < server.AWAY_SECONDS / 2


@pytest.mark.slow
def test_a_server_whose_disk_is_full_is_named_with_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    with (
        temporary_settings({PREFECT_HOME: tmp_path}),
        pytest.raises(NanodlmError, match=rf"server has failed in PREFECT_HOME, {tmp_path} \(.*\); .* run again"),
        ephemeral_server() as url,
        temporary_settings({PREFECT_API_URL: url}),
        get_client(sync_client=True) as client,
    ):
        child = server.OWN.get()
        assert child is not None
        for process in (psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)):
            process.rlimit(psutil.RLIMIT_FSIZE, (1000, psutil.RLIM_INFINITY))
        client.create_flow_from_name("full")


def test_prefect_is_quiet_unless_the_environment_says_otherwise() -> None:
    code = """
import os, sys
from nanodlm.flows import quiet_prefect
quiet_prefect()
print(os.environ["PREFECT_LOGGING_LEVEL"], os.environ["DO_NOT_TRACK"], "prefect" in sys.modules)
"""
    env = environment(DO_NOT_TRACK="yes")
    env.pop("PREFECT_LOGGING_LEVEL", None)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["CRITICAL", "yes", "False"]
