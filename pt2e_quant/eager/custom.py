"""The dictionaries that say what becomes of modules of the user's own: which keys they can have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConversionError, did_you_mean

__all__ = ["check_keys"]

_KEYS = (
    "float_to_observed_custom_module_class",
    "observed_to_quantized_custom_module_class",
    "non_traceable_module_name",
    "non_traceable_module_class",
    "preserved_attributes",
)
"""One dictionary is often given to both `prepare` and `convert`, and each reads its own."""


def check_keys(custom: Mapping[str, Any], argument: str) -> None:
    """Refuse a key that nothing reads, and a mapping that is none."""
    for key, value in custom.items():
        if key not in _KEYS:
            raise ConversionError(f"{argument} has a key {key!r}, which means nothing.{did_you_mean(str(key), _KEYS)}")
        if key.endswith("_custom_module_class") and not isinstance(value, Mapping):
            raise ConversionError(f"{argument}: {key!r} is a dict from class to class, got {value!r}")
