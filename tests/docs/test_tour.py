"""The tour of docs/tour.md, run from its first snippet to its last as a reader would paste it."""

import difflib
import os
import re
import subprocess
import sys
from pathlib import Path

import nanodlm

ROOT = Path(nanodlm.__file__).parents[1]


def _shape(page: str) -> list[str]:
    """Lines of a page without the numbers and texts in its output, which another processor may round otherwise."""
    output = re.compile(r"(?<=```text\n).*?(?=```)", re.DOTALL)
    return output.sub(lambda block: re.sub(r"[\d.]+|'.*'", "…", block[0]), page).splitlines()


def test_the_tour_runs_and_shows_what_it_prints() -> None:
    env = {name: value for name, value in os.environ.items() if name != "JAX_DISABLE_MOST_OPTIMIZATIONS"}
    command = [sys.executable, "docs/snippets.py", "docs/tour.md"]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    written = _shape((ROOT / "docs" / "tour.md").read_text())
    assert not list(difflib.unified_diff(written, _shape(run.stdout), lineterm=""))
