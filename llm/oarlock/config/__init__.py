"""Configurations: typed sections, read from YAML and flags, and checked before Paddle is imported."""

from oarlock.config.finetune import FinetuneConfig
from oarlock.config.load import LoadedConfig, load_config
from oarlock.config.pretrain import PretrainConfig
from oarlock.config.run_config import RunConfig

__all__ = ["FinetuneConfig", "LoadedConfig", "PretrainConfig", "RunConfig", "load_config"]
