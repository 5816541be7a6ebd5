"""Starting and supervising a stage in a process of its own, without Prefect.

The child is `nanodlm train|evaluate|sample|judge CONFIG.json --store URL --inputs STAGE=FINGERPRINT … --events FILE`,
in its own process group. It ends with its parent, writes its progress to that file, and on SIGTERM saves: code 75.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO

from nanodlm.config import Config
from nanodlm.errors import Emit, NanodlmError, Stopped, UsageError, full_disk_named
from nanodlm.precision import measured
from nanodlm.stages.lookup import Lookup
from nanodlm.store import Artifact, Store

PARENT = "NANODLM_PARENT_PID"
# Memory in large pages, on Linux: a training step moves so much of it that looking up small ones costs a fifth of it.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
GRACE_SECONDS = 60.0  # for a child to save after SIGTERM, before it is killed


def stage_flags(store: str, inputs: dict[str, str], *, rebuild: bool = False) -> list[str]:
    """Return the flags of a stage's command; without fingerprints of its inputs it looks up all from the source on."""
    told = ["--inputs", *(f"{stage}={fingerprint}" for stage, fingerprint in inputs.items())] if inputs else []
    return ["--store", store, *told, *(["--rebuild"] if rebuild else [])]


def run_in_process(lookup: Lookup, config: Config, store: Store, *, rebuild: bool = False, emit: Emit) -> Artifact:
    """Build a stage that uses JAX in a child process, and return its artifact, or raise the error that it ends with."""
    name, config = lookup.stage.folder, measured(lookup.stage.of(config))
    with tempfile.TemporaryDirectory(prefix="nanodlm-") as folder, full_disk_named(f"the temporary folder {folder}"):
        config_file, events, errors = (Path(folder) / n for n in ("config.json", "events.jsonl", "stderr.txt"))
        config_file.write_text(config.model_dump_json())
        events.touch()
        command = [sys.executable, "-P", "-m", "nanodlm", name, str(config_file), "--events", str(events)]
        command += stage_flags(store.uri(), lookup.input_fingerprints, rebuild=rebuild)
        env = {**HUGE_PAGES, **os.environ, PARENT: str(os.getpid())}
        with errors.open("wb") as stderr, events.open() as feed, open(os.devnull, "r+b") as null:
            child = subprocess.Popen(command, stdin=null, stdout=null, stderr=stderr, env=env, start_new_session=True)
            try:
                while child.poll() is None:
                    _emit_new_events(feed, emit)
                    time.sleep(0.1)
                _emit_new_events(feed, emit)
            except BaseException as interruption:
                if stop(child, GRACE_SECONDS) == Stopped.exit_code:
                    raise Stopped(last_line(errors.read_text(errors="replace"))) from interruption
                raise
        if child.returncode:
            kind = {Stopped.exit_code: Stopped, UsageError.exit_code: UsageError}.get(child.returncode, NanodlmError)
            ending = f"signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
            said = last_line(errors.read_text(errors="replace"))
            if not said:
                errors.write_text("a full disk may be the reason")
            raise kind(said or f"the {name} process ended with {ending}; run again to continue")
    return store.open(f"{name}/{lookup.fingerprint}")


def _emit_new_events(feed: IO[str], emit: Emit) -> None:
    """Emit the events of the whole lines that were written since the last call."""
    while True:
        start, line = feed.tell(), feed.readline()
        if not line.endswith("\n"):
            feed.seek(start)
            return
        event = json.loads(line)
        del event["time"]
        emit(event.pop("event"), **event)


def last_line(text: str) -> str:
    """Return the line that says why a program ended: the last that is ours or names an error, else the last at all."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    telling = [line for line in lines if re.match(r"nanodlm: |[\w.]+(Error|Exception)\b", line)]
    return (telling or lines)[-1].removeprefix("nanodlm: ")


def stop(child: subprocess.Popen[bytes], grace: float) -> int:
    """Ask a child to save and stop, kill its group when it takes too long, and return how it ended."""
    child.terminate()  # which does nothing to one that has ended
    try:
        child.wait(grace)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
    return child.wait()


def end_with_parent() -> None:
    """End with the process that started this one, which a supervisor names in the environment: by SIGTERM, to save."""
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
