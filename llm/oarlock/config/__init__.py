"""What the user asked for: typed sections, read from YAML and flags, checked before anything heavy is imported."""

from oarlock.config.load import LoadedConfig, load_config
from oarlock.config.schema import FinetuneConfig, PretrainConfig

__all__ = ["FinetuneConfig", "LoadedConfig", "PretrainConfig", "load_config"]
