"""Shared set-up: shapes and types are checked while tests run, and nothing reaches a network or a user's folders."""

import atexit
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.update(JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1", DO_NOT_TRACK="1")
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = (
    "1"  # programs here are tiny: most of their time goes into compiling them
)
os.environ.pop("NANODLM_STORE", None)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers and child processes share what one has compiled
    compiled = tempfile.mkdtemp(prefix="nanodlm-tests-")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)
    os.environ.update(JAX_COMPILATION_CACHE_DIR=compiled, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.2")

from jaxtyping import install_import_hook

CHECKED = [f"nanodlm.{name}" for name in ("schedules", "diffusion", "losses", "samplers", "model")]
install_import_hook(CHECKED, "beartype.beartype")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.path.name not in ("test_flows.py", "test_training.py"))


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from nanodlm import cache

    monkeypatch.setenv("NANODLM_CACHE", str(tmp_path / "cache"))
    yield
    for entry in [entry for entry in cache._held if entry.is_relative_to(tmp_path)]:
        cache._held.pop(entry).close()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of a moto server of our own."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    program = Path(sys.executable).parent / "moto_server"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([str(program), "-H", "127.0.0.1", "-p", str(port)], **quiet)
    try:
        for _ in range(600):
            assert server.poll() is None, "moto_server ended"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def s3_environment(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
