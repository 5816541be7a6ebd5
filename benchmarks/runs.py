"""What the race and the ablation share: whole runs in a store, where finished ones are found again."""

import sys
from typing import Any

from nanodlm.cli.console import Console
from nanodlm.config import Config
from nanodlm.precision import measured
from nanodlm.stages.run import run_stage
from nanodlm.stages.table import until
from nanodlm.store import Artifact, Store


def build(config: Config, store: Store, last: str) -> dict[str, Artifact]:
    """Build what the store lacks of a configuration's stages up to `last`, and return their artifacts by name."""
    console, artifacts, config = Console(sys.stderr), {}, measured(config)
    for name in until(last):
        with console.showing(name) as emit:
            artifacts[name], _ = run_stage(name, config, store, emit=emit)
    return artifacts


def measure(config: Config, store: Store) -> dict[str, Any]:
    """Train and score a configuration, and return what that took and gave.

    Returns:
        `updates`, two and more; `tokens`; `seconds` of training by its own clock, which starts after the first update
        and so counts no compilation; `stage_seconds` of the whole stage, with compilation and checkpoints;
        `bits_per_byte` of the held-out text, and its `stderr`.
    """
    artifacts = build(config, store, "evaluate")
    trained, scored = artifacts["train"].metrics, artifacts["evaluate"].metrics
    return {
        "updates": trained["updates"],
        "tokens": trained["trained_tokens"],
        "seconds": trained["trained_tokens"] / trained["train_tokens_per_second"],
        "stage_seconds": artifacts["train"].manifest["seconds"],
        "bits_per_byte": scored["val_bits_per_byte"],
        "stderr": scored["val_bits_per_byte_stderr"],
    }


def shorten(config: Config, updates: int) -> Config:
    """Return the configuration with another number of updates, of which the same share is the decay at the end.

    >>> shorten(Config().replace(train={"max_steps": 1000, "cooldown_steps": 500}), 300).train.cooldown_steps
    150
    """
    share = config.train.cooldown_steps / config.train.max_steps
    return config.replace(train={"max_steps": updates, "cooldown_steps": round(share * updates)})
