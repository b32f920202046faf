"""FX mode: a symbolic graph of modules, functions and methods, on the engine's plan and observers."""

from .custom_config import (
    ConvertCustomConfig,
    FuseCustomConfig,
    PrepareCustomConfig,
    StandaloneModuleConfigEntry,
)
from .quantizer import QConfigMappingQuantizer

__all__ = [
    "ConvertCustomConfig",
    "FuseCustomConfig",
    "PrepareCustomConfig",
    "QConfigMappingQuantizer",
    "StandaloneModuleConfigEntry",
]
