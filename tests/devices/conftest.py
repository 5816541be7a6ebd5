"""Trainings that the tests of devices and hosts are compared with, made once."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from nanodlm.stages import run as stages_run
from nanodlm.stages import table
from nanodlm.store import Store
from tests.support.devices import CONFIG, attempt, records


@pytest.fixture(scope="package")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with data, and no trained model."""
    folder = tmp_path_factory.mktemp("prepared")
    for name in table.until("shard"):
        stages_run.run_stage(name, CONFIG, Store(str(folder)))
    return folder


@pytest.fixture(scope="package")
def alone(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Log records of a run on the one device of this process."""
    store = tmp_path_factory.mktemp("alone") / "store"
    shutil.copytree(prepared, store)
    stages_run.run_stage("train", CONFIG, Store(str(store)))
    return records(attempt(store))
