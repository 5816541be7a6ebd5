"""The server of one run, and what Prefect reads from the environment."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from nanodlm.errors import NanodlmError
from nanodlm.flows.server import check_server, ephemeral_server
from tests.support.commands import environment


@pytest.mark.slow
def test_servers_that_start_at_once_on_a_new_database_all_come_up(tmp_path: Path) -> None:
    code = "from nanodlm.flows.server import ephemeral_server\nwith ephemeral_server() as server: print(server())"
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
        ephemeral_server() as server,
    ):
        server()


@pytest.mark.slow
def test_a_server_that_has_ended_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "operator:word")  # of others
    with (
        pytest.raises(
            NanodlmError, match=r"the local Prefect server has failed in .*; what is finished is kept: run again"
        ),
        ephemeral_server() as server,
        temporary_settings({PREFECT_API_URL: server()}),
    ):
        check_server()
        child = max(psutil.Process().children(), key=psutil.Process.create_time)  # others may be there before
        child.kill()
        child.wait()
        raise OSError("the request that this would have made fails")


@pytest.mark.slow
def test_a_server_whose_disk_is_full_is_named_with_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    others = psutil.Process().children(recursive=True)  # the server that other tests share may be among them
    with (
        temporary_settings({PREFECT_HOME: tmp_path}),
        pytest.raises(NanodlmError, match=rf"server has failed in PREFECT_HOME, {tmp_path} \(.*\); .* run again"),
        ephemeral_server() as server,
        temporary_settings({PREFECT_API_URL: server()}),
        get_client(sync_client=True) as client,
    ):
        for process in set(psutil.Process().children(recursive=True)) - set(others):
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
