"""Settings of a run: what they are, complete configurations by name, and how two differ. Nothing here imports JAX."""

# ruff: noqa: F401 (others import these names from here)

from nanodlm.config.addresses import StoreUrl, refuse_secrets
from nanodlm.config.differences import differences, explain
from nanodlm.config.presets import PRESETS, load_config
from nanodlm.config.settings import (
    Config,
    DataConfig,
    EvalConfig,
    ExpConfig,
    Group,
    ModelConfig,
    ObjectiveConfig,
    SampleConfig,
    ScheduleConfig,
    TrainConfig,
)
