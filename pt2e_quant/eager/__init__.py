"""Eager mode: modules of a model are replaced by quantized ones. The names of torch.ao.quantization."""

from .convert import convert
from .dynamic import quantize_dynamic
from .fuse import fuse_known_modules, fuse_modules, fuse_modules_qat
from .mappings import (
    default_custom_config,
    default_dynamic_mapping,
    default_qat_mapping,
    default_reference_mapping,
    default_static_mapping,
    embedding_qat_mapping,
)
from .observe import prepare
from .propagate import propagate_qconfig_
from .quantize import default_eval_fn, prepare_qat, quantize, quantize_qat
from .report import Meeting, Stayed, Swapped, SwapReport, swap_report
from .stubs import DeQuantStub, QuantStub, QuantWrapper, add_quant_dequant
from .swap import swap_module

__all__ = [
    "DeQuantStub",
    "Meeting",
    "QuantStub",
    "QuantWrapper",
    "Stayed",
    "SwapReport",
    "Swapped",
    "add_quant_dequant",
    "convert",
    "default_custom_config",
    "default_dynamic_mapping",
    "default_eval_fn",
    "default_qat_mapping",
    "default_reference_mapping",
    "default_static_mapping",
    "embedding_qat_mapping",
    "fuse_known_modules",
    "fuse_modules",
    "fuse_modules_qat",
    "prepare",
    "prepare_qat",
    "propagate_qconfig_",
    "quantize",
    "quantize_dynamic",
    "quantize_qat",
    "swap_module",
    "swap_report",
]
