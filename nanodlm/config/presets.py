"""Complete configurations by name, and reading one from a file."""

import json
from pathlib import Path
from typing import Any

from nanodlm.config.differences import explain
from nanodlm.config.settings import Config
from nanodlm.errors import UsageError

FILES = (".json", ".yaml", ".yml")  # of settings
_DECAY = {"lr_schedule": "warmup_stable_decay", "warmup_steps": 50, "cooldown_steps": 600}
_DEMO = Config().replace(
    data={"part_mb": 2.0},
    model={"n_layers": 2, "conv_width": 5, "tie_embeddings": True, "qk_norm": False},
    objective={"weighting": "uniform"},
    train={"batch_size": 8, "max_steps": 1200, "optimizer": "muon", "lr": 8e-3, "weight_decay": 0.0, **_DECAY},
    sample={"temperature": 0.6},
)

# The original project's data and sizes: 9B GPT-2 tokens of OpenWebText, for one or many GPUs.
_TOKENS = {"source": ("hf://NeelNanda/openwebtext-tokenized-9b",), "column": "tokens", "pretokenized": True}
_TOKENS["revision"] = "5a711cc"  # the upload of the last of its 37 files
_UPDATES = {"batch_size": 64, "grad_acc_steps": 8, "max_steps": 50_000, "warmup_steps": 2000}
_OWT = Config().replace(
    data={**_TOKENS, "tokenizer": "gpt2", "part_mb": 512.0},
    model={"seq_len": 1024, "n_layers": 12, "n_heads": 12, "d_model": 768, "d_ff": 3072, "dtype": "bfloat16"},
    train={**_UPDATES, "lr": 6e-4, "min_lr": 6e-5, "ema_decay": 0.9999},
    eval={"batch_size": 32},
    sample={"num_steps": 1000},
    exp={"log_every": 50, "save_every": 1000},
)

PRESETS: dict[str, Config] = {
    "demo": _DEMO,
    "owt": _OWT,
    # 1.31B parameters, 20 tokens for each. Any number of devices that divides 128 can share it; --train.fsdp cuts what
    # each holds, and remat="dots" is faster where there is memory.
    "owt-1b": _OWT.replace(
        model={"n_layers": 24, "n_heads": 16, "d_model": 2048, "d_ff": 8192, "tie_embeddings": True},
        train={"batch_size": 128, "max_steps": 25_000, "lr": 2e-4, "min_lr": 2e-5, "remat": "full"},
        eval={"batch_size": 128},
    ),
}  # fmt: skip


def load_config(name: str) -> Config:
    """Look up a preset, or read a file of settings, JSON or YAML, or JSON that is given instead of its path.

    Raises:
        UsageError: When there is neither.
    """
    if name in PRESETS:
        return PRESETS[name]
    if name.startswith("{"):
        text, name = name, "the configuration"
    elif not name.endswith(FILES):
        *names, last = PRESETS
        known = f"{', '.join(names)} or {last}"
        raise UsageError(f"unknown preset {name!r}: choose {known}, or name a config.json that a run has written")
    else:
        try:
            text = Path(name).read_text()
        except OSError as error:
            raise UsageError(f"cannot read config {name}: {error.strerror or error}") from error
    try:
        return Config.model_validate(_read_yaml(text) if name.endswith(FILES[1:]) else json.loads(text))
    except ValueError as error:
        raise UsageError(f"{name} is not a valid config: {explain(error)}") from error


def _read_yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
