"""The README's snippets, run as a newcomer would: a fresh clone, a new virtual environment, nothing else."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest

import nanodlm
from tests.support.servers import free_ports

ROOT = Path(nanodlm.__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```(bash|python)\n(.*?)```", README, re.DOTALL)
TEST_COMMAND = "pip install -c constraints.txt -e '.[test]' && pytest\n"


def test_the_file_tree_lists_every_module_once() -> None:
    listed = re.findall(r"^((?:nanodlm|flows)/\w+\.py) ", README, re.MULTILINE)
    present = {f"{p.parent.name}/{p.name}" for folder in ("nanodlm", "flows") for p in (ROOT / folder).glob("*.py")}
    assert sorted(listed) == sorted(present - {"nanodlm/__init__.py", "nanodlm/__main__.py", "flows/__init__.py"})


def test_continuous_integration_runs_the_test_command() -> None:
    assert ("bash", TEST_COMMAND) in SNIPPETS
    script = (ROOT / ".ci" / "run").read_text()
    assert "pip install -q -c constraints.txt -e '.[test]'\n" in script
    assert "\npytest\n" in script


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_every_snippet_works_in_a_fresh_clone_and_the_demo_reaches_its_bound(
    s3_environment: None, tmp_path: Path
) -> None:
    clone, venv = tmp_path / "clone", tmp_path / "venv"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    fsspec.filesystem("s3").mkdir("my-bucket")
    hidden = (
        "VIRTUAL_ENV",
        "PYTHONPATH",
        "NANODLM_STORE",
        "HF_HUB_OFFLINE",
        "JAX_PLATFORMS",
        "JAX_DISABLE_MOST_OPTIMIZATIONS",
    )
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    env |= {
        "PATH": f"{venv / 'bin'}{os.pathsep}{env['PATH']}",
        "NO_COLOR": "1",
        "PREFECT_HOME": str(tmp_path / "prefect"),
    }

    (port,) = free_ports(1)
    env["PREFECT_SERVER_API_PORT"] = str(port)

    def run(command: list[str]) -> str:
        began = time.monotonic()
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        done = subprocess.Popen(command, cwd=clone, env=env, text=True, start_new_session=True, **pipes)
        try:
            said, errors = done.communicate(timeout=1500)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(done.pid, signal.SIGKILL)  # servers and workers that it has left running
        print(f"$ {command[-1]}\n{said}({time.monotonic() - began:.0f} s)\n")  # `pytest -rA` shows it
        assert done.returncode == 0, f"{command}\n{said}\n{errors}"
        return said

    assert SNIPPETS[0] == ("bash", "pip install -c constraints.txt . && nanodlm run\n")
    for language, snippet in SNIPPETS:
        if language == "python":
            run(["python", "-c", snippet])
        elif snippet != TEST_COMMAND:  # that is what is running
            run(["bash", "-euc", snippet.replace(":4200", f":{port}")])
    result = json.loads(run(["nanodlm", "run", "--json"]).splitlines()[-1])
    assert {stage["status"] for stage in result["stages"]} == {"cached"}
    metrics = result["metrics"]
    assert metrics["val_tokens"] == 1_000_000
    assert metrics["val_bits_per_byte"] + 3 * metrics["val_bits_per_byte_stderr"] <= 2.0
    assert metrics["val_bits_per_byte"] <= 0.88 * metrics["val_unigram_bits_per_byte"]
    assert not list(clone.glob("s3:*"))
