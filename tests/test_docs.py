"""The README and the pages of docs/: lengths, links, lists, and the snippets as a newcomer would run them."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import nanodlm
from tests.support.servers import free_ports

ROOT = Path(nanodlm.__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("d*/*.md")])
SNIPPETS = re.findall(r"```(bash|python)\n(.*?)```", README, re.DOTALL)
TEST_COMMAND = "pip install -c constraints.txt -e '.[test]' && pytest\n"


def _anchors(page: Path) -> set[str]:
    """What a link may name behind `#`: the page's headings, written as GitHub and GitLab do."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_test_that_a_page_names_is_there(page: str) -> None:
    for name, test in re.findall(r"`(?:tests/)?((?:\w+/)?test_\w+\.py)(?:::(\w+))?`", (ROOT / page).read_text()):
        assert f"def {test}" in (ROOT / "tests" / name).read_text(), f"there is no {name}::{test}"


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_or_a_heading_that_exists(page: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", link):
            name, _, anchor = link.partition("#")
            target = ((ROOT / page).parent / name) if name else ROOT / page
            assert target.exists(), link
            assert not anchor or anchor in _anchors(target), link


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 950


def test_the_readme_lists_every_room_once() -> None:
    listed = re.findall(r"^([a-z][\w/]*(?:/|\.py))  +\S", README, re.MULTILINE)
    hidden = ("__init__.py", "__main__.py", "__pycache__")
    inner = [path for path in (ROOT / "nanodlm").iterdir() if path.name not in hidden and not path.is_symlink()]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    outer = {f"{name.split('/')[0]}/" for name in tracked.splitlines() if "/" in name and name[0] != "."} - {"nanodlm/"}
    rooms = [f"nanodlm/{path.name}{'/' * path.is_dir()}" for path in inner if path.suffix == ".py" or path.is_dir()]
    assert sorted(listed) == sorted([*rooms, *outer])


def test_continuous_integration_runs_the_test_command() -> None:
    assert ("bash", TEST_COMMAND) in SNIPPETS
    script = (ROOT / ".ci" / "run").read_text()
    assert "pip install -q -c constraints.txt -e '.[test,transformers]'\n" in script
    assert "\npart 'default tests' pytest\n" in script


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_every_snippet_works_in_a_fresh_clone_and_the_demo_reaches_its_bound(tmp_path: Path) -> None:
    clone, venv = tmp_path / "clone", tmp_path / "venv"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    hidden = "VIRTUAL_ENV PYTHONPATH NANODLM_STORE HF_HUB_OFFLINE JAX_PLATFORMS JAX_DISABLE_MOST_OPTIMIZATIONS".split()
    (port,) = free_ports(1)
    env = {name: value for name, value in os.environ.items() if name not in hidden} | {
        "PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "NO_COLOR": "1",
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_SERVER_API_PORT": str(port),
    }

    def run(command: list[str]) -> str:
        began = time.monotonic()
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        done = subprocess.Popen(command, cwd=clone, env=env, text=True, start_new_session=True, **pipes)
        try:
            said, errors = done.communicate(timeout=1500)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(done.pid, signal.SIGKILL)  # servers that it has left running
        print(f"$ {command[-1]}\n{said}({time.monotonic() - began:.0f} s)\n")  # `pytest -rA` shows it
        assert done.returncode == 0, f"{command}\n{said}\n{errors}"
        return said

    assert SNIPPETS[0] == ("bash", "pip install -c constraints.txt -e . && nanodlm run\n")
    for language, snippet in SNIPPETS:
        if language == "python":
            run(["python", "-c", snippet])
        elif snippet != TEST_COMMAND:  # that is what is running
            run(["bash", "-euc", snippet])
    result = json.loads(run(["nanodlm", "run", "--json"]).splitlines()[-1])
    assert {stage["status"] for stage in result["stages"]} == {"cached"}
    metrics = result["metrics"]
    assert metrics["val_tokens"] == 1_000_000
    assert metrics["val_bits_per_byte"] + 3 * metrics["val_bits_per_byte_stderr"] <= 1.7
    assert metrics["val_bits_per_byte"] <= 0.72 * metrics["val_unigram_bits_per_byte"]
    run(["nanodlm", "generate", "--prompt", "The people of the United States", "--gif", str(tmp_path / "picture.gif")])
