"""nanodlm: diffusion language models, from text to samples.

    schedule = nanodlm.make_schedule("linear")
    run = nanodlm.train(nanodlm.PRESETS["demo"])
    model, tokenizer = nanodlm.load(run.uri)

The names below are the stable Python API; they are imported when first used, so that the command line starts fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers
    from nanodlm.checkpoints.loading import load
    from nanodlm.config import PRESETS, Config
    from nanodlm.diffusion.blocks import Decoder, sample_autoregressive, sample_blocks
    from nanodlm.diffusion.nelbo import nelbo
    from nanodlm.diffusion.sampling import sample
    from nanodlm.diffusion.schedules import make_schedule
    from nanodlm.stages.run import train

_HOME = {"PRESETS": "config", "Config": "config", "load": "checkpoints.loading", "train": "stages.run"}
_HOME |= {"make_schedule": "diffusion.schedules", "nelbo": "diffusion.nelbo", "sample": "diffusion.sampling"}
_HOME |= dict.fromkeys(("Decoder", "sample_autoregressive", "sample_blocks"), "diffusion.blocks")
__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"nanodlm.{_HOME[name]}"), name)
    raise AttributeError(f"module 'nanodlm' has no attribute {name!r}")
