"""What the tests of several devices and of several processes share."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from nanodlm.config import PRESETS
from nanodlm.store import Store
from tests.support.commands import speeches

ROOT = Path(__file__).parents[2]
CONFIG = PRESETS["demo"].replace(
    data={"source": speeches(6), "val_tokens": 5000, "tokenizer": "bytes"},
    model={"dtype": "float32", "seq_len": 16, "n_layers": 2, "n_heads": 4, "d_model": 32, "d_ff": 64},
    train={"max_steps": 6, "warmup_steps": 2, "cooldown_steps": 2, "batch_size": 16, "ema_decay": 0.9},
    exp={"save_every": 2, "log_every": 1, "val_rows": 20},
)


def command(store: Path, *flags: str) -> list[str]:
    """Arguments that train the configuration in a store."""
    file = store.parent / "config.json"
    file.write_text(CONFIG.model_dump_json())
    return ["train", str(file), "--store", str(store), *flags]


def on_devices(count: int) -> dict[str, str]:
    """NPROC keeps the devices' collectives from waiting for threads that are not there."""
    return {"NPROC": "16", "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}


def attempt(store: Path) -> Path:
    """The folder of the one train artifact, all of whose files are whole."""
    opened = Store(str(store))
    (fingerprint,) = (f for stage, f in opened if stage == "train")
    artifact = opened.open(f"train/{fingerprint}")
    assert not artifact.problems(deep=True)
    return artifact.local()


def manifest(store: Path) -> dict[str, Any]:
    """Of the one train artifact."""
    return json.loads(next(store.glob("train/*/manifest.json")).read_text())


def records(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "logs.json").read_text())


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """The same losses, gradients and validation bounds within rounding, which grows from update to update."""
    assert [r["step"] for r in found] == [r["step"] for r in expected]
    for name, tolerance in (("loss", 2e-4), ("nats_per_token", 2e-4), ("grad_norm", 5e-3)):
        np.testing.assert_allclose([r[name] for r in found], [r[name] for r in expected], rtol=tolerance)
    scores = [[r["val_nats_per_token"] for r in run if "val_nats_per_token" in r] for run in (found, expected)]
    assert len(scores[0]) == 3
    np.testing.assert_allclose(*scores, rtol=2e-4)
