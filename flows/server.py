"""A Prefect server for one `nanodlm run`: loopback only, gone when its parent is, even after SIGKILL.

And the wait for a server that is away.

python -m flows.server PORT
"""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from nanodlm.errors import NanodlmError
from nanodlm.launch import PARENT, end_with_parent

START_SECONDS = 120.0
AWAY_SECONDS = 900.0  # for which a stage that ended waits for a server that is away


@contextlib.contextmanager
def ephemeral_server() -> Iterator[str]:
    """Start a server in a child process and yield its API's URL.

    Raises:
        NanodlmError: When it does not answer within two minutes.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    for name in ("NO_PROXY", "no_proxy"):  # a proxy of the environment is not asked for this machine's own server
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1")))
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "flows.server", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, PARENT: str(os.getpid()), "PREFECT_API_URL": "", "PREFECT_UI_ENABLED": "false"},
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + START_SECONDS
            while not _healthy(url):
                if child.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    last = (log.read().decode(errors="replace").strip().splitlines() or ["no output"])[-1]
                    raise NanodlmError(
                        f"the local Prefect server did not start ({last}); "
                        "set PREFECT_API_URL to use a running one, or PREFECT_HOME to a folder that can be written"
                    )
                time.sleep(0.1)
            yield url
        finally:
            child.terminate()
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def wait_for_server(emit: Callable[..., None]) -> None:
    """Wait, at most for `AWAY_SECONDS`, until the Prefect server of the settings answers.

    A task's last state is an event, which Prefect sends for some seconds only: lost, the task would look as if it ran
    for ever.

    Args:
        emit: Called as `emit("message", text=...)` when there is something to wait for.
    """
    deadline, said = time.monotonic() + AWAY_SECONDS, False
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), get_client(sync_client=True) as client:
        while client.api_healthcheck() and time.monotonic() < deadline:
            if not said:
                emit("message", text="the Prefect server is away: waiting to tell it how the stage ended")
                said = True
            time.sleep(1)


def main(port: int) -> None:
    """Serve the Prefect API on the loopback interface until told to stop."""
    end_with_parent()
    import uvicorn
    from prefect.server.api.server import create_app

    uvicorn.run(create_app(ephemeral=True, final=True), host="127.0.0.1", port=port, log_level="error", lifespan="on")


if __name__ == "__main__":
    main(int(sys.argv[1]))
