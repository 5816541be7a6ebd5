"""A command that is killed at any change that it makes to files leaves every artifact as before it or as after it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import environment

CASES = ["repair", "gc", "gc of all", "copy", "rebuild", "rm"]


def kill(case: str, folder: Path, step: int) -> None:
    """Kill a command of tests/support/kills.py at every `step`-th change, in a process without JAX and threads."""
    command = [sys.executable, "-m", "tests.support.kills", case, str(folder), str(step)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    *wrong, changes = done.stdout.splitlines()
    assert not wrong, "\n".join([*wrong[:20], f"{len(wrong)} things in {changes}"])
    assert int(changes.split()[0]) > 5, "it was killed while it worked"


@pytest.mark.parametrize("case", CASES)
def test_killed_at_some_changes_it_loses_nothing_and_ends_well_when_run_again(case: str, tmp_path: Path) -> None:
    kill(case, tmp_path, 7)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_at_every_change_it_loses_nothing_and_ends_well_when_run_again(case: str, tmp_path: Path) -> None:
    kill(case, tmp_path, 1)
