"""Eager mode: modules of a model are replaced by quantized ones. The names of torch.ao.quantization."""

from .dynamic import quantize_dynamic
from .fuse import fuse_known_modules, fuse_modules, fuse_modules_qat
from .propagate import propagate_qconfig_
from .report import Stayed, Swapped, SwapReport, swap_report
from .stubs import DeQuantStub, QuantStub, QuantWrapper, add_quant_dequant
from .swap import default_dynamic_mapping, swap_module

__all__ = [
    "DeQuantStub",
    "QuantStub",
    "QuantWrapper",
    "Stayed",
    "SwapReport",
    "Swapped",
    "add_quant_dequant",
    "default_dynamic_mapping",
    "fuse_known_modules",
    "fuse_modules",
    "fuse_modules_qat",
    "propagate_qconfig_",
    "quantize_dynamic",
    "swap_module",
    "swap_report",
]
