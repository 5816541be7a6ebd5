"""A train artifact and an exported folder of 2026-11-30, which every later version reads as they were read then.

    python -m tests.checkpoints.test_golden FOLDER    # made them; for a new format make new ones, and keep these

A change by which these tests fail makes the models of all users unreadable: read both formats. The optimizer's state,
which nothing here reads, is left out.
"""

import json
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nanodlm
from nanodlm.checkpoints.exported import export
from nanodlm.checkpoints.loading import parameters_sha256
from nanodlm.config import PRESETS

GOLDEN = Path(__file__).with_name("golden")
TEXT = "The Congress of the United States:  naïve 日\n"
SEEN = slice(None, None, 37)  # the logits that are compared
CONFIG = PRESETS["demo"].replace(
    data={"vocab_size": 300},
    model={"seq_len": 32, "n_layers": 2, "n_heads": 2, "d_model": 8, "d_ff": 16, "conv_width": 3,
           "time_conditioning": True, "tie_embeddings": True},
    train={"max_steps": 40, "warmup_steps": 2, "cooldown_steps": 8, "batch_size": 8},
    exp={"save_every": 40, "val_rows": 0, "run_name": "golden"},
)  # fmt: skip


def observed(address: str) -> dict[str, object]:
    """What there is to say of a model: its parameters, the tokens of a text, logits of a row that is partly masked."""
    model, encoding = nanodlm.load(address)
    ids = encoding.encode_ordinary(TEXT)
    row = [model.objective.mask_id if i % 3 == 0 else token for i, token in enumerate(ids)]
    logits = model(jnp.array([row]), jnp.array([0.3]))[0, ::5, SEEN]
    sha256 = parameters_sha256(nnx.to_pure_dict(nnx.state(model)))
    return {"parameters_sha256": sha256, "tokens": ids, "logits": np.asarray(logits).tolist()}


@pytest.mark.filterwarnings("ignore:.* was made before")
@pytest.mark.parametrize("kind", ["artifact", "checkpoint", "exported folder"])
def test_what_was_saved_then_is_read_now(kind: str) -> None:
    (artifact,) = GOLDEN.glob("train/*")
    checkpoint = next(artifact.glob("attempts/*/checkpoints/step_*"))
    places = {"artifact": artifact, "checkpoint": checkpoint, "exported folder": GOLDEN / "exported"}
    expected, found = json.loads((GOLDEN / "expected.json").read_text()), observed(str(places[kind]))
    scale = np.abs(logits := expected.pop("logits")).max()
    assert scale > 1
    np.testing.assert_allclose(found.pop("logits"), logits, rtol=0, atol=1e-5 * scale)
    assert found == expected


if __name__ == "__main__":
    store, made = Path(sys.argv[1]), nanodlm.train(CONFIG, sys.argv[1])
    export(*nanodlm.load(made.uri), CONFIG, store / "exported", "# A tiny model, for tests\n")
    (store / "expected.json").write_text(json.dumps(observed(made.uri)))
    others = {path for path in store.iterdir() if path.is_dir()} - {store / "train", store / "exported"}
    for folder in {*others, *store.rglob("optimizer_state")}:
        shutil.rmtree(folder)
    (store / "exported" / "modeling_nanodlm.py").unlink()  # code, which is tested as it is today
