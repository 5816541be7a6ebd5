"""Settings of a run: what they are, complete configurations by name, and how two differ. Nothing here imports JAX."""

from nanodlm.config.addresses import Address as Address
from nanodlm.config.addresses import StoreUrl as StoreUrl
from nanodlm.config.addresses import parse_address as parse_address
from nanodlm.config.addresses import refuse_secrets as refuse_secrets
from nanodlm.config.differences import differences as differences
from nanodlm.config.differences import explain as explain
from nanodlm.config.meaning import evaluation_settings as evaluation_settings
from nanodlm.config.meaning import sampling_settings as sampling_settings
from nanodlm.config.meaning import training_settings as training_settings
from nanodlm.config.meaning import unread as unread
from nanodlm.config.presets import PRESETS as PRESETS
from nanodlm.config.presets import load_config as load_config
from nanodlm.config.settings import Config as Config
from nanodlm.config.settings import DataConfig as DataConfig
from nanodlm.config.settings import EvalConfig as EvalConfig
from nanodlm.config.settings import ExpConfig as ExpConfig
from nanodlm.config.settings import Group as Group
from nanodlm.config.settings import ModelConfig as ModelConfig
from nanodlm.config.settings import ObjectiveConfig as ObjectiveConfig
from nanodlm.config.settings import SampleConfig as SampleConfig
from nanodlm.config.settings import ScheduleConfig as ScheduleConfig
from nanodlm.config.settings import TrainConfig as TrainConfig
