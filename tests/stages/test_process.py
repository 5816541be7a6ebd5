"""Stages in processes of their own end with those that started them."""

import subprocess
import sys

import psutil
import pytest

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
