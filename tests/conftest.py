"""Shared set-up: shapes and types are checked while tests run, and nothing reaches a network or a user's folders."""

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.update(JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1", DO_NOT_TRACK="1")
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # programs here are tiny: most of their time goes into compiling
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # read at import; the emulator has no such folders
os.environ.pop("NANODLM_STORE", None)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers and child processes share what one has compiled
    compiled = tempfile.mkdtemp(prefix="nanodlm-tests-")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)
    os.environ.update(JAX_COMPILATION_CACHE_DIR=compiled, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.2")

os.environ.setdefault("MPLCONFIGDIR", os.environ["JAX_COMPILATION_CACHE_DIR"])  # of matplotlib's list of fonts

from jaxtyping import install_import_hook

import nanodlm
from nanodlm.precision import machine
from nanodlm.store import Artifact, Store
from tests.support import servers
from tests.support.training import tiny

install_import_hook(["nanodlm.diffusion", "nanodlm.model"], "beartype.beartype")


def in_float32(cache: Path) -> None:
    """Let processes with a cache take float32 for `auto`, whatever is faster on this machine."""
    chosen = cache / "precision" / machine()
    chosen.parent.mkdir(parents=True, exist_ok=True)
    chosen.write_text("float32")


os.environ["NANODLM_CACHE"] = os.path.join(os.environ["JAX_COMPILATION_CACHE_DIR"], "nanodlm")  # of shared fixtures
in_float32(Path(os.environ["NANODLM_CACHE"]))
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore, and their children


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.path.name not in ("test_pipeline.py", "test_loop.py", "test_docs.py"))


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    cache = tmp_path.with_name(f"{tmp_path.name}-cache")  # for tests look at all that a folder of theirs holds
    monkeypatch.setenv("NANODLM_CACHE", str(cache))
    in_float32(cache)
    yield
    servers.let_go_of_the_cache()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment that names a Prefect server of the tests' own."""
    with servers.ephemeral_prefect(tmp_path_factory.mktemp("prefect")) as environ:
        yield environ


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this test run share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def moto_server(run_folder: Path) -> Iterator[servers.Server]:
    with servers.shared(run_folder, "moto") as server:
        yield server


@pytest.fixture(scope="session")
def seaweedfs_server(run_folder: Path) -> Iterator[servers.Server]:
    with servers.shared(run_folder, "seaweedfs") as server:
        yield server


@pytest.fixture(scope="session")
def gcs_server(run_folder: Path) -> Iterator[servers.Server]:
    with servers.shared(run_folder, "fake_gcs") as server:
        yield server


@pytest.fixture
def s3_environment(moto_server: servers.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches an S3 server of our own."""
    moto_server.enter(monkeypatch)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store for models that several tests read."""
    return Store(str(tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="session")
def trained(models: Store) -> Artifact:
    """The tiny model, trained."""
    return nanodlm.train(tiny(), models.uri())
