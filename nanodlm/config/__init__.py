"""Settings of a run: what they are, complete configurations by name, and how two differ. Nothing here imports JAX."""

from nanodlm.config.addresses import Address, StoreUrl, parse_address, refuse_secrets
from nanodlm.config.differences import differences, explain
from nanodlm.config.meaning import evaluation_settings, is_twin, sampling_settings, training_settings, twin, unread
from nanodlm.config.presets import FILES, PRESETS, Changes, Preset, as_changes, changed, load_config
from nanodlm.config.settings import (
    IF_ANY,
    Config,
    DataConfig,
    Group,
    ModelConfig,
    SampleConfig,
    SamplerConfig,
    ScoreConfig,
    TextRequest,
    TrainConfig,
)
