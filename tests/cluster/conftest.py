"""A configuration whose jobs take seconds, and a store with its data."""

from pathlib import Path

import pytest

from nanodlm.cluster.settings import Launch
from nanodlm.config import PRESETS
from nanodlm.stages import run, table
from nanodlm.store import Store
from tests.support.commands import speeches

CONFIG = PRESETS["demo"].replace(
    data={"source": speeches(6), "val_tokens": 5000, "tokenizer": "bytes"},
    model={"dtype": "float32", "seq_len": 16, "n_layers": 1, "n_heads": 2, "d_model": 32, "d_ff": 64},
    train={"max_steps": 30, "warmup_steps": 2, "cooldown_steps": 4, "batch_size": 8},
    exp={"save_every": 10, "val_rows": 8},
)
NASTY = PRESETS["demo"].replace(sample={"prompt": 'it\'s $(HOME) `id` $PATH \\ "é"\nCONFIG\n$$'})
SLURM = Launch(target="slurm", nodes=2, gpus_per_node=0)
GPUS = Launch(target="slurm", nodes=4, gpus_per_node=8, grace_seconds=300)
PODS = Launch(target="k8s", nodes=4, gpus_per_node=8, image="registry.local/nanodlm:1",
              store_volume="shared", secret="bucket", grace_seconds=300)  # fmt: skip
BUCKET = Launch(target="k8s", image="registry.local/nanodlm:1")
INPUTS = {"shard": "ab12", "tokenizer": "cd34"}


def stand_in(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with data, and no trained model."""
    folder = tmp_path_factory.mktemp("prepared")
    for name in table.until("shard"):
        run.run_stage(name, CONFIG, Store(str(folder)))
    return folder
