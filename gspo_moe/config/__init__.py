"""One run's configuration: what it may say (schema), how it is read (loading), what fits (layout, checks)."""

from gspo_moe.config.architecture import PRESETS, Architecture, architecture_from_hf
from gspo_moe.config.checks import check_files
from gspo_moe.config.layout import Layout, check_layout
from gspo_moe.config.loading import load_config, save_config
from gspo_moe.config.schema import Config
from gspo_moe.errors import ConfigError

__all__ = [
    "PRESETS",
    "Architecture",
    "Config",
    "ConfigError",
    "Layout",
    "architecture_from_hf",
    "check_files",
    "check_layout",
    "load_config",
    "save_config",
]
