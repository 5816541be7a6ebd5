"""Starting and supervising a stage in a process of its own, without Prefect.

The child is `nanodlm train|evaluate|sample CONFIG.json --store URL --events FILE`, in its own process group. It ends
when its parent does, writes its progress to the events file, and on SIGTERM saves and exits with 75.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from nanodlm.config import Config
from nanodlm.errors import NanodlmError, Stopped, UsageError

PARENT = "NANODLM_PARENT_PID"
GRACE_SECONDS = 60.0  # for a child to save after SIGTERM, before it is killed


def run_in_process(
    name: str, config: Config, store_url: str, *, rebuild: bool = False, emit: Callable[..., None]
) -> None:
    """Run one stage in a child process until it ends.

    Args:
        name: `train`, `evaluate` or `sample`.
        config: The run's configuration.
        store_url: Where artifacts lie.
        rebuild: Build even when the artifact exists.
        emit: Called with the child's events.

    Raises:
        Stopped: When the child saved and stopped because of a signal.
        UsageError: When the child exits with 2.
        NanodlmError: When it fails or is killed; the message is its own last line.
    """
    with tempfile.TemporaryDirectory(prefix="nanodlm-") as folder:
        config_file, events, errors = (Path(folder) / n for n in ("config.json", "events.jsonl", "stderr.txt"))
        config_file.write_text(config.model_dump_json())
        events.touch()
        command = [
            sys.executable,
            "-P",
            "-m",
            "nanodlm",
            name,
            str(config_file),
            "--store",
            store_url,
            "--events",
            str(events),
        ]
        with errors.open("wb") as stderr, events.open() as feed:
            child = subprocess.Popen(
                [*command, *(["--rebuild"] if rebuild else [])],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env={**os.environ, PARENT: str(os.getpid())},
                start_new_session=True,
            )
            try:
                while child.poll() is None:
                    for event in _new_events(feed):
                        emit(event.pop("event"), **event)
                    time.sleep(0.1)
                for event in _new_events(feed):
                    emit(event.pop("event"), **event)
            except BaseException as interruption:
                code = _stop(child)
                if code == Stopped.exit_code:
                    raise Stopped(_last_line(errors)) from interruption
                raise
            finally:
                _stop(child)
        if child.returncode:
            kind = {Stopped.exit_code: Stopped, UsageError.exit_code: UsageError}.get(child.returncode, NanodlmError)
            ending = f"signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
            raise kind(_last_line(errors) or f"the {name} process ended with {ending}; run again to continue")


def _new_events(feed: IO[str]) -> Iterator[dict[str, Any]]:
    """Whole lines written since the last call."""
    while True:
        at = feed.tell()
        line = feed.readline()
        if not line.endswith("\n"):
            feed.seek(at)
            return
        event = json.loads(line)
        event.pop("time", None)
        yield event


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("nanodlm: ") if lines else ""


def _stop(child: subprocess.Popen[bytes]) -> int:
    """Ask the child to save and stop; kill its group when it takes too long."""
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
    return child.wait()


def end_with_parent() -> None:
    """When a supervisor started this process, watch it and end with it: SIGTERM first, so that work is saved."""
    parent = int(os.environ.pop(PARENT, "0"))
    if not parent:
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
