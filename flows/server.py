"""A Prefect server for one `nanodlm run`, gone when its parent is, even after SIGKILL."""

import contextlib
import gc
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import IO, cast

from filelock import FileLock

from nanodlm.errors import NanodlmError
from nanodlm.stages.process import PARENT, end_with_parent, last_line, stop

START_SECONDS = 120.0


@contextlib.contextmanager
def ephemeral_server() -> Iterator[Callable[[], str]]:
    """Start a server in a child process, and yield what waits until it answers, and returns its API's URL.

    Until it is waited for it only loads its code, as its parent may do meanwhile: Prefect's takes both of them seconds.
    It is an error when it ends before its time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name in ("NO_PROXY", "no_proxy"):  # a proxy of the environment is not asked for this machine's own server
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1")))
    environ = {**os.environ, PARENT: str(os.getpid()), "PREFECT_API_URL": ""}
    environ.pop("PREFECT_SERVER_API_AUTH_STRING", None)
    command = [sys.executable, "-P", "-m", "nanodlm.flows.server", "--port", str(port)]
    with tempfile.NamedTemporaryFile() as log, contextlib.ExitStack() as starting:
        child = subprocess.Popen(
            command, bufsize=0, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environ, start_new_session=True
        )
        go = starting.enter_context(cast(IO[bytes], child.stdin))

        def ready() -> str:
            from prefect.settings import get_current_settings

            home, failure = get_current_settings().home, "the local Prefect server did not start"
            remedy = "set PREFECT_API_URL to use a running one, or PREFECT_HOME"
            remedy = f"{remedy}, now {home}, to a folder that can be written and has room"
            try:  # one after the other: two that start on a new database would both make its tables, and one would fail
                home.mkdir(parents=True, exist_ok=True)
                starting.enter_context(FileLock(home / "nanodlm-server-starts.lock"))
            except OSError as error:
                raise NanodlmError(f"{failure} ({error}); {remedy}") from error
            with contextlib.suppress(BrokenPipeError):  # it has ended, as is seen below
                go.write(b"serve\n")
            url, deadline = f"http://127.0.0.1:{port}/api", time.monotonic() + START_SECONDS
            while not _answers(url):
                if child.poll() is not None or time.monotonic() > deadline:
                    said = last_line(Path(log.name).read_text(errors="replace"))
                    raise NanodlmError(f"{failure} ({said}); {remedy}")
                time.sleep(0.1)
            starting.close()
            return url

        try:
            yield ready
        except Exception as error:
            from httpx import HTTPStatusError
            from prefect.settings import get_current_settings

            if isinstance(error, NanodlmError) or (child.poll() is None and not isinstance(error, HTTPStatusError)):
                raise
            home = get_current_settings().home
            said = f"has failed in PREFECT_HOME, {home} ({last_line(Path(log.name).read_text(errors='replace'))})"
            raise NanodlmError(f"the local Prefect server {said}; what is finished is kept: run again") from error
        finally:
            stop(child, 10)


def _answers(url: str) -> bool:
    """Say if a server, or what stands before it, answers with anything but an error of its own."""
    import httpx

    with contextlib.suppress(httpx.HTTPError):  # who it is does not matter here: nothing is told to it
        return not httpx.get(f"{url}/health", timeout=5, verify=False).is_server_error
    return False


def check_server() -> None:
    """Raise an error of one line when the server that the settings name does not answer, or refuses."""
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.settings import get_current_settings

    url = get_current_settings().api.url
    try:
        with get_client(sync_client=True) as client:
            client.read_flows(limit=1)
    except (httpx.HTTPError, RuntimeError, ValueError) as error:
        if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == 401:
            raise NanodlmError(f"the Prefect server at {url} refuses access: set PREFECT_API_AUTH_STRING") from error
        remedy = "start it (`prefect server start --host 127.0.0.1`), or correct PREFECT_API_URL, which ends in /api"
        raise NanodlmError(f"no Prefect server answers at {url}: {remedy}") from error


if __name__ == "__main__":
    gc.set_threshold(20_000)  # as the command line does
    end_with_parent()
    options = ["--host", "127.0.0.1", "--no-ui", "--no-scheduler", "--no-late-runs", "--log-level", "ERROR"]
    sys.argv[1:] = ["server", "start", *options, *sys.argv[1:]]
    import_module("prefect.server.api.server")  # most of what takes long
    if not sys.stdin.readline():  # nobody waits for it any more
        sys.exit()
    runpy.run_module("prefect", run_name="__main__")
