"""The steps of docs/extending.md, done on a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nanodlm

ROOT = Path(nanodlm.__file__).parents[1]


def _apply(diff: str, folder: Path) -> None:
    """Apply a diff whose places are found by their text alone, for the page has no line numbers."""
    head, *hunks = re.split(r"^@@.*\n", diff, flags=re.MULTILINE)
    named = re.match(r"--- a/(\S+)\n\+\+\+ b/\1\n", head)
    assert named, diff
    path = folder / named[1]
    for hunk in filter(None, [head[named.end() :], *hunks]):
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] != "+")
        after = "".join(line[1:] for line in lines if line[0] != "-")
        text = path.read_text()
        assert text.count(before) == 1, f"{named[1]} does not have this once:\n{before}"
        path.write_text(text.replace(before, after))


def test_each_thing_is_added_as_the_page_says(tmp_path: Path) -> None:
    for package in ("nanodlm", "flows"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    page = (ROOT / "docs" / "extending.md").read_text()
    blocks = re.findall(r"^```(diff|python|bash)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert {language for language, _ in blocks} == {"diff", "python", "bash"}
    for language, text in blocks:
        if language == "diff":
            _apply(text, tmp_path)
    snippets = "".join(text for language, text in blocks if language == "python")
    commands = 'nanodlm() { "$PYTHON" -m nanodlm "$@"; }\n' + "".join(t for lang, t in blocks if lang == "bash")
    ours = f"import nanodlm\nassert nanodlm.__file__.startswith({str(tmp_path)!r})\n"
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHON": sys.executable}
    for command in ([sys.executable, "-c", ours + snippets], ["bash", "-euc", commands]):
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
