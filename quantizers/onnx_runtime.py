"""OnnxRuntimeQuantizer: what onnxruntime runs with its integer kernels on processors, and nothing else.

Activations are uint8 with any zero point, weights int8 with zero point 0 and a scale for each output channel, biases
stay float: onnxruntime brings them to int32 itself. A convolution has to end in integers, a linear need not. Dynamic
means: the qparams of a linear's input are computed at run time, one pair for the whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import ClassVar

import torch

from pt2e_quant import ops
from pt2e_quant.checks import checked
from pt2e_quant.errors import SpecError
from pt2e_quant.lowering.onnx import limits
from pt2e_quant.observer import MSEObserver, PerChannelMinMaxObserver, PerGroupMSEObserver, PlaceholderObserver
from pt2e_quant.quantizer import (
    INHERIT,
    INPUT,
    OUTPUT,
    WEIGHT,
    Match,
    QuantizationConfig,
    RuleQuantizer,
    because,
    clamp_to_hardtanh,
    fold_zero_padding,
    for_training,
    matmul_to_linear,
    one_scale,
    op,
    rule,
    same_as,
    split_to_slices,
)
from pt2e_quant.specs import QuantizationSpec

from .common import SYMMETRIC_RANGES, computed_table, config_of, copying, drops_values

__all__ = [
    "RULES",
    "OnnxRuntimeQuantizer",
    "get_onnx_runtime_quantization_config",
    "get_onnx_runtime_weight_only_config",
]

aten = torch.ops.aten

_SYMMETRIC = (torch.per_channel_symmetric, torch.per_tensor_symmetric)


@checked(SpecError)
def get_onnx_runtime_quantization_config(
    is_qat: bool = False, is_dynamic: bool = False, reduce_range: bool = False
) -> QuantizationConfig:
    """uint8 activations (asymmetric) and int8 weights (symmetric, one scale per output channel).

    Args:
        is_qat: fake quantizers instead of observers, for prepare_qat_pt2e.
        is_dynamic: activation qparams at run time; needs no calibration data, works for linear.
        reduce_range: weights in [-64, 63]. For processors without VNNI: there, two products of 8 bits are added in 16
            bits, which overflow. The lowering tells when a machine needs it.
    """
    activation = QuantizationSpec(
        dtype=torch.uint8,
        quant_min=0,
        quant_max=255,
        qscheme=torch.per_tensor_affine,
        is_dynamic=is_dynamic,
        observer_or_fake_quant_ctr=PlaceholderObserver if is_dynamic else MSEObserver,
    )
    weight = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-64 if reduce_range else -127,
        quant_max=63 if reduce_range else 127,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        observer_or_fake_quant_ctr=PerChannelMinMaxObserver,
    )
    config = QuantizationConfig(activation, None if is_dynamic else activation, weight)
    return for_training(config) if is_qat else config


@checked(SpecError)
def get_onnx_runtime_weight_only_config(bits: int = 4, group_size: int = 32) -> QuantizationConfig:
    """Linears with integer weights and float activations; needs no calibration data.

    Args:
        bits: 4, in groups, with the scales of the least squared error; or 8, with a scale for each output.
        group_size: of 4 bits: neighbours in a row that share a scale, a power of two from 16 on.

    Raises:
        SpecError: onnxruntime has no kernel for that.
    """
    if bits not in SYMMETRIC_RANGES:
        raise SpecError(f"onnxruntime multiplies by weights of 4 and of 8 bits, got {bits=}")
    refused = limits.blocks(group_size, group_size) if bits == 4 else None
    if refused is not None:
        raise SpecError(refused)
    low, high = SYMMETRIC_RANGES[bits]
    grouped = PerGroupMSEObserver.with_args(group_size=group_size)
    weight = QuantizationSpec(
        dtype=torch.int8, quant_min=low, quant_max=high, qscheme=torch.per_channel_symmetric, ch_axis=0,
        observer_or_fake_quant_ctr=grouped if bits == 4 else PerChannelMinMaxObserver,
    )  # fmt: skip
    return QuantizationConfig(None, None, weight)


# Ops ------------------------------------------------------------------------------------------------------------------

conv = op(*ops.CONV1D, *ops.CONV2D, *ops.CONV3D)
linear = op(*ops.LINEAR)
clamp = op(*ops.RELUS)
rectify = op(*ops.RELU)
plus, times = op(*ops.ADD), op(*ops.MUL)
lookup = op(aten.embedding.default)
product = op(aten.matmul.default, aten.bmm.default)
concatenate = op(*ops.CAT)
maximum_of = op(aten.max_pool1d.default, aten.max_pool2d.default)
mean_of, whole_pool = op(aten.mean.dim), op(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default)
average = op(aten.avg_pool1d.default, aten.avg_pool2d.default)
padding = op(*ops.PAD)
squash = op(aten.sigmoid.default, *ops.LEAKY_RELU)
reshaping = op(*ops.RESHAPE, *ops.SQUEEZE, *ops.PERMUTE, *ops.SLICE)


# Reasons for refusal --------------------------------------------------------------------------------------------------


def not_static(match: Match) -> str | None:
    config = config_of(match)
    if config.is_dynamic:
        return because("configuration", limits.DYNAMIC_PRODUCT)
    if config.input_activation is None or config.output_activation is None:
        return because(
            "configuration", "the configuration keeps activations in float, so onnxruntime computes in float"
        )
    return not_8_bits(match)


def weight_format(match: Match) -> str | None:
    spec = config_of(match).weight_spec
    if spec is None:
        why = "the configuration keeps weights in float, so onnxruntime would multiply in float"
        return because("configuration", why)
    return limits.weight(spec.dtype, spec.qscheme in _SYMMETRIC)


def no_blocks(match: Match) -> str | None:
    size, w = config_of(match).group_size, match.value("w")
    if not size:
        return None
    if not config_of(match).is_weight_only:
        return because("configuration", "weights in groups need float activations; set input_activation=None")
    return None if w is None else limits.blocks(int(w.shape[1]), size)


def not_8_bits(match: Match) -> str | None:
    spec = config_of(match).input_spec
    return None if spec is None else limits.not_8_bits(spec.dtype)


def computed_parameters(match: Match) -> str | None:
    for name in ("w", "b"):
        if match.captures.get(name) is not None and not match.is_constant(name):
            why = f"{match.captures[name]} is computed at run time; the kernel takes constants"
            return because("computed_operand", why)
    return None


def adds_otherwise(match: Match) -> str | None:
    return limits.adds_otherwise(match.argument(plus, "alpha"))


_CONSTANT = because(
    "unsupported_op", "one operand is a constant, and this quantizer has a recipe for two computed ones only"
)


def with_a_number(match: Match) -> str | None:
    alone = any(match.value(name) is None or match.is_constant(name) for name in ("a", "b"))
    return _CONSTANT if alone else None


def not_in_bytes(match: Match) -> str | None:
    if not match.explicit and not config_of(match).is_weight_only:
        why = "a table of integers saves memory, not time; ask for it with set_operator_type"
        return because("not_asked_for", why)
    if config_of(match).group_size:
        why = "tables take a byte for each value here, and 8 bits lose less than 4; give it a configuration of 8 bits"
        return because("configuration", why)
    return weight_format(match)


def not_asked_for(match: Match) -> str | None:
    if match.explicit:
        return None
    why = "a product of two activations stays in float unless set_operator_type(torch.ops.aten.matmul, ...) asks"
    return because("not_asked_for", why)


def mean_of_part(match: Match) -> str | None:
    x, dims = match.value("x"), match.argument(mean_of, "dim")
    return None if x is None else limits.mean_of_part(x.dim(), dims, match.argument(mean_of, "dtype"))


def not_zero_padding(match: Match) -> str | None:
    zeros = ops.pads_zeros(match.calls[0][1])
    return None if zeros else because("padding", "only zeros are padded in integers")


def pool_of_part(match: Match) -> str | None:
    sizes = match.argument(whole_pool, "output_size")
    return None if all(size == 1 for size in sizes) else limits.mean_of_part(0, None, None)


_CONV = (not_static, weight_format, no_blocks, computed_parameters)
_LINEAR = (weight_format, no_blocks, not_8_bits, computed_parameters)


# Rules: the first that fits a node takes it ---------------------------------------------------------------------------


@rule(x=INPUT, w=WEIGHT, output=OUTPUT, unless=_CONV)
def conv_clamp(x, w, b):
    """relu, relu6 and hardtanh are part of the quantize after them, which saturates at their bounds."""
    return clamp(conv(x, w, b))


@rule(x=INPUT, w=WEIGHT, output=OUTPUT, unless=_CONV)
def conv_only(x, w, b):
    return conv(x, w, b)


@rule(x=INPUT, w=WEIGHT, output=OUTPUT, unless=[*_LINEAR, not_static])
def linear_clamp(x, w, b):
    return clamp(linear(x, w, b))


@rule(x=INPUT, w=WEIGHT, output=OUTPUT, unless=_LINEAR)
def linear_only(x, w, b):
    """mm, matmul and addmm with a constant second operand arrive here too, see `matmul_to_linear`."""
    return linear(x, w, b)


@rule(w=WEIGHT, unless=[not_in_bytes, computed_table])
def embedding(w, index):
    """The rows that are looked up become real numbers."""
    return lookup(w, index)


@rule(a=INPUT, b=INPUT, output=OUTPUT, unless=[not_asked_for, not_static])
def matmul(a, b):
    return product(a, b)


@rule(a=INPUT, b=INPUT, output=OUTPUT, unless=[not_static, adds_otherwise, with_a_number])
def add_relu(a, b):
    return rectify(plus(a, b))


@rule(a=INPUT, b=INPUT, output=OUTPUT, unless=[not_static, adds_otherwise, with_a_number])
def add(a, b):
    return plus(a, b)


@rule(a=INPUT, b=INPUT, output=OUTPUT, unless=[not_static, with_a_number])
def mul(a, b):
    return times(a, b)


@rule(tensors=one_scale(INPUT), output=same_as("tensors"), unless=[not_static])
def cat(*tensors):
    return concatenate(tensors)


@rule(x=INHERIT, output=OUTPUT, unless=[not_static])
def squashed(x):
    """sigmoid and leaky_relu: a table of 256 values."""
    return squash(x)


@rule(x=INHERIT, output=OUTPUT, unless=[not_static, mean_of_part])
def mean(x):
    """The mean of many integers is finer than their step, so it gets a scale of its own."""
    return mean_of(x)


@rule(x=INHERIT, output=OUTPUT, unless=[not_static, pool_of_part])
def adaptive_avg_pool(x):
    return whole_pool(x)


@rule(x=INHERIT, output=OUTPUT, unless=[not_static])
def avg_pool(x):
    return average(x)


@rule(x=INHERIT, output=same_as("x"))
def max_pool(x):
    return maximum_of(x)


@rule(x=INHERIT, output=same_as("x"))
def move(x):
    return reshaping(x)


@rule(x=INHERIT, output=same_as("x"), unless=[not_zero_padding])
def pad(x):
    """Part of the convolution that reads it; in float where none does."""
    return padding(x)


@rule(x=INHERIT, output=same_as("x"), unless=[drops_values])
def copy(x):
    return copying(x)


RULES = (
    conv_clamp, conv_only, linear_clamp, linear_only, embedding, matmul, add_relu, add, mul, cat, squashed, mean,
    adaptive_avg_pool, avg_pool, max_pool, move, pad, copy,
)  # fmt: skip

_FLOAT = "onnxruntime runs it in float"


class OnnxRuntimeQuantizer(RuleQuantizer):
    """Annotates what onnxruntime runs in integers on processors; the report says why it leaves the rest.

    quantizer = OnnxRuntimeQuantizer().set_global(get_onnx_runtime_quantization_config())

    Products of two activations are quantized only where a selector narrower than the global one asks for it.
    """

    rules = RULES
    reasons = MappingProxyType(
        dict.fromkeys(ops.CONV_TRANSPOSE, limits.TRANSPOSED)
        | dict.fromkeys((*ops.ADD, *ops.MUL), _CONSTANT)
        | dict.fromkeys(
            (
                *ops.SUB, *ops.DIV, *ops.NORM, *ops.ATTENTION, *ops.RELUS, aten.gelu.default,
                aten.silu.default, aten.hardswish.default, aten.hardsigmoid.default, aten.tanh.default,
                aten.softmax.int, *ops.EMBEDDING_BAG,
                aten.clamp.default, aten.pixel_shuffle.default,
            ),
            _FLOAT,
        )
    )  # fmt: skip
    transforms = (matmul_to_linear, clamp_to_hardtanh, fold_zero_padding, split_to_slices)
    spares_streams = True
    precisions: ClassVar[Mapping[str, Callable[[], QuantizationConfig]]] = {
        "int8": get_onnx_runtime_quantization_config,
        "int4": get_onnx_runtime_weight_only_config,
    }
    modes = MappingProxyType(
        {
            "static": get_onnx_runtime_quantization_config,
            "dynamic": partial(get_onnx_runtime_quantization_config, is_dynamic=True),
            "weight_only": get_onnx_runtime_weight_only_config,
        }
    )
    lowers_to = "onnx"
