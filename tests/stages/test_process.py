"""Stages in processes of their own are told their inputs, and end with those that started them."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psutil
import pytest

from nanodlm.errors import NanodlmError, silent
from nanodlm.stages.lookup import ready
from nanodlm.stages.process import run_in_process
from nanodlm.store import Artifact
from tests.support.commands import full, nanodlm, result_of, speeches, tiny_flags
from tests.support.training import tiny

CHILD = """
import signal, time
from nanodlm.stages import process
{setting}
process.end_with_parent()
print("ready", flush=True)
time.sleep(600)
"""
PARENT = """
import os, subprocess, sys
from nanodlm.stages.process import PARENT
env = {**os.environ, PARENT: str(os.getpid())}
subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=env, start_new_session=True)
sys.stdin.read()
"""
# Python imports this first in every process that has its folder on PYTHONPATH: it writes down which files are opened.
NOTE_OPENED = """
import os, sys

def note(event, args):
    if event == "open" and os.fspath(args[0] if isinstance(args[0], str) else "").endswith(("manifest.json", ".txt")):
        words, path = sys.orig_argv, os.path.abspath(args[0])
        command = words[words.index("nanodlm") + 1] if "nanodlm" in words else "other"
        with_ = os.open(os.environ["OPENED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(with_, f"{command} {path}\\n".encode())
        os.close(with_)

sys.addaudithook(note)
"""


@pytest.mark.parametrize("setting", ["", "process.GRACE_SECONDS = 0.2; signal.signal(signal.SIGTERM, signal.SIG_IGN)"])
def test_a_child_ends_with_a_killed_parent_even_when_it_takes_too_long_to_save(setting: str) -> None:
    command = [sys.executable, "-c", PARENT, CHILD.format(setting=setting)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        (child,) = psutil.Process(parent.pid).children()
        parent.kill()
        parent.wait()
        assert psutil.wait_procs([child], 20)[1] == []


def test_a_temporary_folder_that_is_full_is_named(trained: Artifact) -> None:
    lookup, line = (
        ready("train", tiny(), trained.store),
        r"into the temporary folder .*: File too large; make room",
    )
    with full(100), pytest.raises(NanodlmError, match=line):
        run_in_process(lookup, tiny(), trained.store, emit=silent)


@pytest.mark.slow
def test_a_fresh_run_opens_few_manifests_and_only_its_first_process_opens_the_source(
    prefect_server: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(NOTE_OPENED)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    flags = [*tiny_flags(), "--data.part_mb", "100", "--train.max_steps", "10", "--store", str(tmp_path / "store")]
    environ = {**prefect_server, "PYTHONPATH": path, "OPENED": str(tmp_path / "opened")}
    result = result_of(nanodlm("run", *flags, "--json", **environ))
    assert {stage["status"] for stage in result["stages"]} == {"built"}
    opened = [line.split(" ", 1) for line in (tmp_path / "opened").read_text().splitlines()]
    sources = {os.path.abspath(path) for path in speeches(30)}
    assert {command for command, path in opened if path in sources} == {"run"}
    manifests = Counter(command for command, path in opened if path.endswith("/manifest.json"))
    # Each child opens those of its inputs, and looks once for its own.
    assert [manifests[name] for name in ("train", "evaluate", "sample")] == [3, 3, 3]
    assert manifests["run"] <= 23  # of eight stages: before, and while the lease is held or after the child; the report
