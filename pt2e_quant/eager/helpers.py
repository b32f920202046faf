"""Helpers that programs import beside the names of eager mode, under the reference's names: views of the mappings."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn import functional as F

from ..checks import checked
from ..errors import ConversionError, SpecError, did_you_mean
from ..fake_quantize import FakeQuantizeBase
from ..nn import quantizable
from ..nn.quantized import functional
from ..observer import ObserverBase
from ..qconfig import QConfig
from ..qconfig_mapping import get_default_qat_qconfig_mapping, get_default_qconfig_mapping
from .fuse import fuse_known_modules, is_known
from .mappings import (
    default_custom_config,
    default_dynamic_mapping,
    default_qat_mapping,
    default_reference_mapping,
    default_static_mapping,
    embedding_qat_mapping,
)
from .observe import DEFAULT_MODULE_TO_ACT_POST_PROCESS

__all__ = [
    "DEFAULT_DYNAMIC_QUANT_MODULE_MAPPINGS",
    "DEFAULT_FLOAT_TO_QUANTIZED_OPERATOR_MAPPINGS",
    "DEFAULT_MODULE_TO_ACT_POST_PROCESS",
    "DEFAULT_QAT_MODULE_MAPPINGS",
    "DEFAULT_REFERENCE_STATIC_QUANT_MODULE_MAPPINGS",
    "DEFAULT_STATIC_QUANT_MODULE_MAPPINGS",
    "ObserverOrFakeQuantize",
    "QConfigDynamic",
    "QuantType",
    "fuse_conv_bn",
    "fuse_conv_bn_relu",
    "fuse_convtranspose_bn",
    "fuse_linear_bn",
    "get_combined_dict",
    "get_default_compare_output_module_list",
    "get_default_custom_config_dict",
    "get_default_dynamic_quant_module_mappings",
    "get_default_float_to_quantized_operator_mappings",
    "get_default_qat_module_mappings",
    "get_default_qat_qconfig_dict",
    "get_default_qconfig_dict",
    "get_default_qconfig_propagation_list",
    "get_default_static_quant_module_mappings",
    "get_default_static_quant_reference_module_mappings",
    "get_dynamic_quant_module_class",
    "get_embedding_qat_module_mappings",
    "get_embedding_static_quant_module_mappings",
    "get_fuser_method",
    "get_quantized_operator",
    "get_static_quant_module_class",
    "no_observer_set",
]


ObserverOrFakeQuantize = ObserverBase | FakeQuantizeBase


class QuantType(enum.IntEnum):
    """When what is quantized."""

    DYNAMIC = 0
    STATIC = 1
    QAT = 2
    WEIGHT_ONLY = 3


get_default_static_quant_module_mappings = default_static_mapping
get_embedding_static_quant_module_mappings = default_static_mapping
get_default_static_quant_reference_module_mappings = default_reference_mapping
get_default_dynamic_quant_module_mappings = default_dynamic_mapping
get_default_qat_module_mappings = default_qat_mapping
get_embedding_qat_module_mappings = embedding_qat_mapping
get_default_custom_config_dict = default_custom_config


DEFAULT_STATIC_QUANT_MODULE_MAPPINGS = default_static_mapping()
DEFAULT_REFERENCE_STATIC_QUANT_MODULE_MAPPINGS = default_reference_mapping()
DEFAULT_DYNAMIC_QUANT_MODULE_MAPPINGS = default_dynamic_mapping()
DEFAULT_QAT_MODULE_MAPPINGS = default_qat_mapping()


@checked(SpecError)
def QConfigDynamic(activation: Any = nn.Identity, weight: Any = nn.Identity) -> QConfig:
    """The reference's old name: a QConfig whose halves can be left out, which leaves them in float."""
    return QConfig(activation, weight)


@checked(ConversionError)
def get_static_quant_module_class(
    float_module_class: type,
    additional_static_quant_mapping: Mapping[Any, Any] | None = None,
    is_reference: bool = False,
) -> Any:
    """The statically quantized class, or the reference class, of a float one.

    Args:
        additional_static_quant_mapping: float class -> class; it comes first.

    Raises:
        ConversionError: there is none.
    """
    mapping = default_reference_mapping() if is_reference else default_static_mapping()
    return _found(float_module_class, get_combined_dict(mapping, additional_static_quant_mapping), "static")


@checked(ConversionError)
def get_dynamic_quant_module_class(
    float_module_class: type, additional_dynamic_quant_mapping: Mapping[Any, Any] | None = None
) -> Any:
    """The dynamically quantized class of a float one.

    Args:
        additional_dynamic_quant_mapping: float class -> class; it comes first.

    Raises:
        ConversionError: there is none.
    """
    mapping = get_combined_dict(default_dynamic_mapping(), additional_dynamic_quant_mapping)
    return _found(float_module_class, mapping, "dynamic")


def get_default_qconfig_propagation_list() -> set[type[nn.Module]]:
    """Classes that some form of quantization knows."""
    return {*default_static_mapping(), *embedding_qat_mapping(), *default_dynamic_mapping()}


def get_default_compare_output_module_list() -> set[type[nn.Module]]:
    """These, and what becomes of them: classes whose outputs can be compared."""
    mappings = (default_static_mapping(), embedding_qat_mapping(), default_dynamic_mapping())
    return get_default_qconfig_propagation_list().union(*(mapping.values() for mapping in mappings))


def get_default_float_to_quantized_operator_mappings() -> dict[Any, Callable[..., Any]]:
    """Function of torch.nn.functional -> that of nn.quantized.functional."""
    return {getattr(F, name): getattr(functional, name) for name in functional.__all__ if hasattr(F, name)}


DEFAULT_FLOAT_TO_QUANTIZED_OPERATOR_MAPPINGS = get_default_float_to_quantized_operator_mappings()


@checked(ConversionError)
def get_quantized_operator(float_op: Callable[..., Any]) -> Any:
    """The quantized form of a function of torch.nn.functional.

    Raises:
        ConversionError: there is none.
    """
    return _found(float_op, get_default_float_to_quantized_operator_mappings(), "quantized")


def no_observer_set() -> set[type[nn.Module]]:
    """Classes that observe what is inside of them, and not their output."""
    return {quantizable.LSTM, quantizable.LSTMCell, quantizable.MultiheadAttention}


@checked(ConversionError)
def get_combined_dict(
    default_dict: Mapping[Any, Any], additional_dict: Mapping[Any, Any] | None = None
) -> dict[Any, Any]:
    """Both, the second over the first."""
    return {**default_dict, **(additional_dict or {})}


def _found(key: Any, mapping: Mapping[Any, Any], form: str) -> Any:
    if key not in mapping:
        name = getattr(key, "__name__", str(key))
        known = (getattr(one, "__name__", "") for one in mapping)
        raise ConversionError(f"{name} has no {form} form.{did_you_mean(name, known)}")
    return mapping[key]


@checked(SpecError)
def get_default_qconfig_dict(backend: str = "x86", version: int = 0) -> dict[str, Any]:
    """`get_default_qconfig_mapping` as a dictionary."""
    return get_default_qconfig_mapping(backend, version).to_dict()


@checked(SpecError)
def get_default_qat_qconfig_dict(backend: str = "x86", version: int = 1) -> dict[str, Any]:
    """`get_default_qat_qconfig_mapping` as a dictionary."""
    return get_default_qat_qconfig_mapping(backend, version).to_dict()


# --- fusing -----------------------------------------------------------------------------------------------------------


@checked(ConversionError)
def get_fuser_method(
    op_list: Sequence[type], additional_fuser_method_mapping: Mapping[Any, Any] | None = None
) -> Callable[..., nn.Module]:
    """The function of (is_qat, *modules) that fuses modules of these classes, in this order.

    Raises:
        ConversionError: they are not known to fuse.
    """
    custom = (additional_fuser_method_mapping or {}).get(tuple(op_list))
    if custom is not None:
        return custom  # type: ignore[no-any-return]
    blanks = [object.__new__(kind) for kind in op_list if issubclass(kind, nn.Module)]
    if len(blanks) < len(op_list) or not (is_known(blanks, False) or is_known(blanks, True)):
        raise ConversionError(f"{[kind.__name__ for kind in op_list]} are not known to fuse")
    return _fused


def _fused(is_qat: bool, *modules: nn.Module) -> nn.Module:
    return fuse_known_modules(list(modules), is_qat)[0]


@checked(ConversionError)
def fuse_conv_bn(is_qat: bool, conv: nn.Module, bn: nn.Module) -> nn.Module:
    """A convolution with its batch norm: folded, or a container to train.

    Raises:
        ConversionError: they do not fuse, or are in the wrong mode.
    """
    return _fused(is_qat, conv, bn)


@checked(ConversionError)
def fuse_conv_bn_relu(is_qat: bool, conv: nn.Module, bn: nn.Module, relu: nn.Module) -> nn.Module:
    """`fuse_conv_bn` with a ReLU behind it."""
    return _fused(is_qat, conv, bn, relu)


@checked(ConversionError)
def fuse_linear_bn(is_qat: bool, linear: nn.Module, bn: nn.Module) -> nn.Module:
    """`fuse_conv_bn` for a linear."""
    return _fused(is_qat, linear, bn)


@checked(ConversionError)
def fuse_convtranspose_bn(is_qat: bool, convt: nn.Module, bn: nn.Module) -> nn.Module:
    """`fuse_conv_bn` for a transposed convolution, in evaluation."""
    return _fused(is_qat, convt, bn)
