"""Eager mode: modules of a model are replaced by quantized ones. The names of torch.ao.quantization."""

from .dynamic import quantize_dynamic
from .propagate import propagate_qconfig_
from .report import Stayed, Swapped, SwapReport, swap_report
from .swap import default_dynamic_mapping, swap_module

__all__ = [
    "Stayed",
    "SwapReport",
    "Swapped",
    "default_dynamic_mapping",
    "propagate_qconfig_",
    "quantize_dynamic",
    "swap_module",
    "swap_report",
]
