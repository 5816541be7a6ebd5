"""nanodlm: diffusion language models, from text to samples.

    schedule = nanodlm.make_schedule("linear")
    run = nanodlm.train(nanodlm.PRESETS["demo"])
    model, tokenizer = nanodlm.load(run.uri)

The names below are the stable Python API; they are imported when first used, so that the command line starts fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanodlm.checkpoint import load
    from nanodlm.config import PRESETS, Config
    from nanodlm.losses import nelbo
    from nanodlm.samplers import Decoder, sample, sample_autoregressive, sample_blocks
    from nanodlm.schedules import make_schedule
    from nanodlm.stages import train

__all__ = [
    "PRESETS",
    "Config",
    "Decoder",
    "load",
    "make_schedule",
    "nelbo",
    "sample",
    "sample_autoregressive",
    "sample_blocks",
    "train",
]

_HOME = {
    "PRESETS": "config",
    "Config": "config",
    "load": "checkpoint",
    "make_schedule": "schedules",
    "nelbo": "losses",
    "Decoder": "samplers",
    "sample": "samplers",
    "sample_autoregressive": "samplers",
    "sample_blocks": "samplers",
    "train": "stages",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"nanodlm.{_HOME[name]}"), name)
    raise AttributeError(f"module 'nanodlm' has no attribute {name!r}")
