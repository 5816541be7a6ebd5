"""A model that trains in seconds, for all who need one."""

from typing import Any

from nanodlm.build import make_model
from nanodlm.config import PRESETS, Config
from nanodlm.data.tokenizer import plain_bytes
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.model.transformer import Transformer
from tests.support.commands import speeches


def tiny(**groups: dict[str, Any]) -> Config:
    base = PRESETS["demo"].replace(
        data={"source": speeches(6), "val_tokens": 5000, "tokenizer": "bytes"},
        model={"dtype": "float32", "seq_len": 32, "n_layers": 1, "n_heads": 2, "d_model": 16, "d_ff": 32},
        train={"optimizer": "adamw", "max_steps": 12, "warmup_steps": 2, "cooldown_steps": 4, "batch_size": 4},
        eval={"max_rows": 20, "batch_size": 8},
        sample={"num_samples": 2, "num_steps": 4},
        exp={"save_every": 5, "log_every": 3, "val_rows": 0},
    )
    return base.replace(**groups)


def untrained(rows: str = "stream", **objective: Any) -> Transformer:
    """A network of bytes in rows of 8, whose layers are all at random."""
    config = tiny(data={"rows": rows}, model={"seq_len": 8, "zero_init": False}, objective=objective)
    return make_model(config, Vocabulary.of(plain_bytes()))


MANY = tiny(
    data={"isolate_documents": True},
    model={"time_conditioning": True, "dtype": "bfloat16"},
    train={"ema_decay": 0.9, "optimizer": "muon"},
    objective={"estimator": "continuous", "weighting": "bound"},
)
