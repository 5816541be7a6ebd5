"""One finished run, with checkpoints after updates 4, 8 and 12, that the tests of checkpoints start from."""

import shutil
from pathlib import Path

import pytest

import nanodlm
from nanodlm.store import Artifact, Store
from tests.support.checkpoints import EVERY
from tests.support.training import tiny


@pytest.fixture(scope="package")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="package")
def trained(store: Store) -> Artifact:
    return nanodlm.train(tiny(exp=EVERY), store.uri())


@pytest.fixture
def fourth(trained: Artifact) -> str:
    """Address of the checkpoint after update 4."""
    return f"{trained.uri}/step_4"


@pytest.fixture
def data(trained: Artifact, tmp_path: Path) -> Path:
    """A store that holds the data of the tiny configuration and nothing else."""
    for stage in ("download", "split", "shard", "tokenizer"):
        shutil.copytree(Path(trained.store.root) / stage, tmp_path / "store" / stage)
    return tmp_path / "store"
