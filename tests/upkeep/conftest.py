"""A store with everything from the download to a sample, copies of it to be damaged, and empty ones."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from nanodlm.stages import run
from nanodlm.store import Store, sealed
from tests.support.helpers import prose
from tests.support.training import tiny
from tests.support.upkeep import CHAIN, Made


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A store with everything from the download to a sample."""
    folder = tmp_path_factory.mktemp("master")
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in prose(400)))
    data = {"source": str(folder / "corpus.jsonl"), "val_tokens": 1000, "part_mb": 0.02}
    config, store = tiny(data=data, exp={"save_every": 6, "val_rows": 0}), Store(str(folder / "store"))
    return Made(store, config, {name: run.run_stage(name, config, store)[0] for name in CHAIN})


@pytest.fixture
def made(master: Made, tmp_path: Path) -> Made:
    """A copy of that store, and of its source, to be damaged."""
    shutil.copytree(master.store.root, tmp_path / "store")
    shutil.copy(master.config.data.source[0], tmp_path / "corpus.jsonl")
    store = Store(str(tmp_path / "store"))
    config = master.config.replace(data={"source": str(tmp_path / "corpus.jsonl")})
    for artifact in master.artifacts.values():  # it names this copy of the source
        manifest = sealed({**artifact.manifest, "config": config.model_dump(mode="json")})
        store.write_json(store.path(artifact.stage, artifact.fingerprint, "manifest.json"), manifest)
    return Made(store, config, {name: store.open(a.uri) for name, a in master.artifacts.items()})


@pytest.fixture
def remote() -> Iterator[Store]:
    yield Store("memory://upkeep/runs")
    fsspec.filesystem("memory").store.clear()
