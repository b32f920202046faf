"""What a backend quantizes, as values: the classes of torch.ao.quantization.backend_config."""

from .config import BackendConfig, BackendPatternConfig
from .dtypes import DTypeConfig, DTypeWithConstraints, ObservationType
from .native import get_native_backend_config

__all__ = [
    "BackendConfig",
    "BackendPatternConfig",
    "DTypeConfig",
    "DTypeWithConstraints",
    "ObservationType",
    "get_native_backend_config",
]
