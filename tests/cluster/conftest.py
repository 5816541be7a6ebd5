"""A configuration whose jobs take seconds, and a store with its data."""

from pathlib import Path

import pytest

from nanodlm.config import PRESETS
from nanodlm.stages import run, table
from nanodlm.store import Store
from tests.support.commands import speeches

CONFIG = PRESETS["demo"].replace(
    data={"source": speeches(6), "val_tokens": 5000, "tokenizer": "bytes"},
    model={"seq_len": 16, "n_layers": 1, "n_heads": 2, "d_model": 32, "d_ff": 64},
    train={"max_steps": 30, "warmup_steps": 2, "cooldown_steps": 4, "batch_size": 8},
    exp={"save_every": 10, "val_rows": 8},
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with data, and no trained model."""
    folder = tmp_path_factory.mktemp("prepared")
    for name in table.until("shard"):
        run.run_stage(name, CONFIG, Store(str(folder)))
    return folder
