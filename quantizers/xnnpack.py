"""XNNPACKQuantizer: what ExecuTorch's XNNPACK backend runs in integers, and nothing else.

Activations are signed int8 with any zero point, weights int8 in [-127, 127] with zero point 0, per tensor or per output
channel; the bias stays float and becomes int32 inside the delegate. A value-preserving op has one scale for input and
output. Dynamic means: activation qparams are computed at run time, per row of the input.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from pt2e_quant.checks import checked
from pt2e_quant.errors import SpecError
from pt2e_quant.lowering.executorch.xnnpack import limits
from pt2e_quant.lowering.executorch.xnnpack.limits import Case, Kernel, Limit
from pt2e_quant.observer import (
    MinMaxObserver,
    MSEObserver,
    PerChannelMinMaxObserver,
    PerGroupMSEObserver,
    PerTokenPlaceholderObserver,
    PlaceholderObserver,
)
from pt2e_quant.quantizer import (
    INHERIT,
    INPUT,
    OUTPUT,
    WEIGHT,
    Match,
    Op,
    QuantizationConfig,
    RuleQuantizer,
    because,
    clamp_to_hardtanh,
    for_training,
    lift_scalars,
    matmul_to_linear,
    mean_keeps_dims,
    one_scale,
    op,
    rule,
    same_as,
    split_to_slices,
    trained_activation,
)
from pt2e_quant.specs import QuantizationSpec, QuantizationSpecBase, is_per_channel

from .common import config_of, copying, drops_values

__all__ = ["RULES", "XNNPACKQuantizer", "get_8da4w_config", "get_symmetric_quantization_config"]

aten = torch.ops.aten

_EPS = 2**-12  # smallest scale: with less, the requantization multipliers of XNNPACK leave their fixed-point range
_HUGE = 1e6


@checked(SpecError)
def get_symmetric_quantization_config(
    is_per_channel: bool = False,
    is_qat: bool = False,
    is_dynamic: bool = False,
    act_qmin: int = limits.ACTIVATION_RANGE[0],
    act_qmax: int = limits.ACTIVATION_RANGE[1],
    weight_qmin: int = limits.WEIGHT_RANGE[0],
    weight_qmax: int = limits.WEIGHT_RANGE[1],
) -> QuantizationConfig:
    """int8 activations (asymmetric) and int8 weights (symmetric).

    Args:
        is_per_channel: one weight scale per output channel instead of one in all. Dynamic needs it.
        is_qat: fake quantizers instead of observers, for prepare_qat_pt2e.
        is_dynamic: activation qparams at run time; needs no calibration data, works for linear, conv2d, and conv2d
            transposed.
        act_qmin, act_qmax, weight_qmin, weight_qmax: bounds of the integers, both included.

    Raises:
        SpecError: a range is not one of int8.
    """
    activation = QuantizationSpec(
        dtype=torch.int8,
        quant_min=act_qmin,
        quant_max=act_qmax,
        qscheme=torch.per_tensor_affine,
        is_dynamic=is_dynamic,
        observer_or_fake_quant_ctr=(PlaceholderObserver if is_dynamic else MSEObserver).with_args(eps=_EPS),
    )
    weight = QuantizationSpec(
        dtype=torch.int8,
        quant_min=weight_qmin,
        quant_max=weight_qmax,
        qscheme=torch.per_channel_symmetric if is_per_channel else torch.per_tensor_symmetric,
        ch_axis=0 if is_per_channel else None,
        observer_or_fake_quant_ctr=(PerChannelMinMaxObserver if is_per_channel else MinMaxObserver).with_args(eps=_EPS),
    )
    config = QuantizationConfig(activation, None if is_dynamic else activation, weight)
    return for_training(config) if is_qat else config


@checked(SpecError)
def get_8da4w_config(group_size: int = 32, is_qat: bool = False) -> QuantizationConfig:
    """Linears only: int8 activations per row at run time, weights of 4 bits (-8..7) in groups, for decoders.

    Args:
        group_size: weights that share a scale, a multiple of 32. The scales are those of the least squared error,
            rounded to bfloat16, which is what XNNPACK stores: the converted graph computes with the same ones.
        is_qat: fake quantizers instead of observers, for prepare_qat_pt2e.

    Raises:
        SpecError: XNNPACK has no kernel for groups of that size.
    """
    refused = limits.group_size(group_size)
    if refused is not None:
        raise SpecError(refused)
    low, high = limits.GROUP_RANGE
    weight = QuantizationSpec(
        dtype=torch.int8, quant_min=low, quant_max=high, qscheme=torch.per_channel_symmetric, ch_axis=0,
        observer_or_fake_quant_ctr=PerGroupMSEObserver.with_args(
            group_size=group_size, eps=_EPS, scale_dtype=torch.bfloat16
        ),
    )  # fmt: skip
    activation = get_symmetric_quantization_config(True, is_dynamic=True).input_activation
    config = QuantizationConfig(activation, None, weight)
    return for_training(config) if is_qat else config


# Ops and what their kernels do not take -------------------------------------------------------------------------------

conv, conv_transpose = op(*limits.CONVOLUTION.ops), op(*limits.TRANSPOSED.ops)
linear, padding = op(*limits.LINEAR.ops), op(*limits.PADDING.ops)
activation, rectify = op(*limits.CONVOLUTION.fuses), op(*limits.ADD.fuses)
plus, minus, times = op(*limits.ADD.ops), op(*limits.SUB.ops), op(*limits.MUL.ops)
concatenate, mean_of, average = op(*limits.CAT.ops), op(*limits.MEAN.ops), op(*limits.AVERAGE.ops)
maximum_of, clamping, reshaping = op(*limits.MAX_POOL.ops), op(*limits.CLAMP.ops), op(*limits.RESHAPE.ops)
slicing, squeezing = op(*limits.SLICE.ops), op(*limits.SQUEEZE.ops)

Unless = Callable[[Match], "str | None"]


def within(kernel: Kernel, declared: Op) -> tuple[Unless, ...]:
    """The limits of a kernel, asked of the node that an op of the pattern matched."""
    return tuple(asked(limit, declared) for limit in kernel.limits)


def asked(limit: Limit, declared: Op) -> Unless:
    @functools.wraps(limit)
    def unless(match: Match) -> str | None:
        return limit(_case(match, declared))

    return unless


def _case(match: Match, declared: Op) -> Case:
    """The operator, quantized as the user's configuration asks for it."""
    config = config_of(match)
    static: Literal["static"] | None = None if config.input_activation is None else "static"
    per_channel = config.weight_spec is not None and is_per_channel(config.weight_spec.qscheme)
    return Case(
        next(node for known, node in match.calls if known is declared),
        activation="dynamic" if config.is_dynamic else static,
        weight=None if config.weight is None else "channel" if per_channel else "tensor",
        is_constant=match.constants.__contains__,
        group=config.group_size,
        output=config.output_activation is not None,
    )


def not_static(match: Match) -> str | None:
    return limits.not_static(_case(match, match.calls[0][0]))


def huge_constant(match: Match) -> str | None:
    """An attention mask of -1e9 and the like would take the whole range of the sum for itself."""
    for name in ("a", "b"):
        node = match.captures[name]
        if isinstance(node, Node) and node in match.constants and _largest(match.constants.value(node)) > _HUGE:
            why = f"the constant {node} reaches beyond {_HUGE:g}; next to it all other values would round to one"
            return because("range", why)
    return None


def _largest(constant: Tensor) -> float:
    return float(constant.abs().max()) if constant.numel() and not constant.is_meta else 0.0


def rows(config: QuantizationConfig) -> QuantizationSpecBase | None:
    """The input of a linear. XNNPACK's dynamic linear has a scale for each row, so the graph must say so as well."""
    spec = config.input_activation
    if isinstance(spec, QuantizationSpec) and spec.is_dynamic:
        per_row = replace(spec, observer_or_fake_quant_ctr=PerTokenPlaceholderObserver.with_args(eps=_EPS))
        return trained_activation(per_row) if config.is_qat else per_row
    return spec


_CONV, _TRANSPOSED = within(limits.CONVOLUTION, conv), within(limits.TRANSPOSED, conv_transpose)
_LINEAR, _PADDING = within(limits.LINEAR, linear), within(limits.PADDING, padding)


# Rules: the first that fits a node takes it ---------------------------------------------------------------------------


@rule(x=INPUT, w=WEIGHT, output=OUTPUT, unless=[*_CONV, not_static])
def conv_relu(x, w, b):
    """Also relu6 and hardtanh, with any bounds: they become the bounds of the kernel's output."""
    return activation(conv(x, w, b))


@rule(x=INPUT, w=WEIGHT, output=OUTPUT, unless=[*_CONV, asked(limits.one_scale_in_all, conv)])
def conv_only(x, w, b):
    return conv(x, w, b)


@rule(x=INPUT, w=WEIGHT, output=OUTPUT, unless=[*_CONV, not_static, *_PADDING])
def pad_conv_relu(x, w, b):
    """Zero padding before a convolution becomes the kernel's own, so nothing is quantized between the two."""
    return activation(conv(padding(x), w, b))


@rule(x=INPUT, w=WEIGHT, output=OUTPUT, unless=[*_CONV, not_static, *_PADDING])
def pad_conv(x, w, b):
    return conv(padding(x), w, b)


@rule(x=INPUT, w=WEIGHT.at(1), output=OUTPUT, unless=[*_TRANSPOSED, not_static])
def conv_transpose_relu(x, w, b):
    """The weight of a transposed convolution is (in, out / groups, *kernel): channels on axis 1."""
    return activation(conv_transpose(x, w, b))


@rule(x=INPUT, w=WEIGHT.at(1), output=OUTPUT, unless=[*_TRANSPOSED, asked(limits.one_scale_in_all, conv_transpose)])
def conv_transpose_only(x, w, b):
    return conv_transpose(x, w, b)


@rule(x=rows, w=WEIGHT, output=OUTPUT, unless=[*_LINEAR, not_static])
def linear_relu(x, w, b):
    return activation(linear(x, w, b))


@rule(x=rows, w=WEIGHT, output=OUTPUT, unless=_LINEAR)
def linear_only(x, w, b):
    """mm, matmul and addmm with a constant second operand arrive here too, see `matmul_to_linear`."""
    return linear(x, w, b)


@rule(a=INPUT, b=INPUT, output=OUTPUT, unless=[*within(limits.ADD, plus), huge_constant])
def add_relu(a, b):
    """Only relu: with other bounds XNNPACK adds in float. Those stay after an integer add of their own."""
    return rectify(plus(a, b))


@rule(a=INPUT, b=INPUT, output=OUTPUT, unless=[*within(limits.ADD, plus), huge_constant])
def add(a, b):
    return plus(a, b)


@rule(a=INPUT, b=INPUT, output=OUTPUT, unless=[*within(limits.SUB, minus), huge_constant])
def sub(a, b):
    return minus(a, b)


@rule(a=INPUT, b=INPUT, output=OUTPUT, unless=[*within(limits.MUL, times), huge_constant])
def mul(a, b):
    """A relu after it is not fused: XNNPACK would run both in float. As two integer kernels the relu is exact."""
    return times(a, b)


@rule(tensors=one_scale(INPUT), output=same_as("tensors"), unless=within(limits.CAT, concatenate))
def cat(*tensors):
    return concatenate(tensors)


@rule(x=INHERIT, output=OUTPUT, unless=within(limits.MEAN, mean_of))
def mean(x):
    """The mean of many integers is finer than their step, so it gets a scale of its own."""
    return mean_of(x)


@rule(x=INHERIT, output=OUTPUT, unless=within(limits.AVERAGE, average))
def adaptive_avg_pool2d(x):
    return average(x)


@rule(x=INHERIT, output=same_as("x"), unless=within(limits.MAX_POOL, maximum_of))
def max_pool2d(x):
    return maximum_of(x)


@rule(x=INHERIT, output=same_as("x"))
def clamp(x):
    """relu, relu6, hardtanh, clamp after a quantized tensor: exact on its own integers."""
    return clamping(x)


@rule(x=INHERIT, output=same_as("x"))
def reshape(x):
    return reshaping(x)


@rule(x=INHERIT, output=same_as("x"), unless=[drops_values])
def copy(x):
    """Dropout in inference, clone and the like: nothing is left of them in the delegate."""
    return copying(x)


@rule(x=INHERIT, output=same_as("x"), unless=within(limits.SLICE, slicing))
def slice_(x):
    return slicing(x)


@rule(x=INHERIT, output=same_as("x"), unless=within(limits.SQUEEZE, squeezing))
def squeeze(x):
    return squeezing(x)


RULES = (
    pad_conv_relu, pad_conv, conv_relu, conv_only, conv_transpose_relu, conv_transpose_only, linear_relu, linear_only,
    add_relu, add, sub, mul, cat, mean, adaptive_avg_pool2d, max_pool2d, clamp, reshape, copy, slice_,
    squeeze,
)  # fmt: skip


class XNNPACKQuantizer(RuleQuantizer):
    """Annotates what XNNPACK runs in integers; the report says why it leaves the rest.

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    """

    rules = RULES
    reasons = limits.REASONS
    transforms = (matmul_to_linear, mean_keeps_dims, clamp_to_hardtanh, lift_scalars, split_to_slices)
    decompose = frozenset({"sdpa", "rnn"})
    spares_streams = True
    precisions: ClassVar[Mapping[str, Callable[[], QuantizationConfig]]] = {
        "int8": functools.partial(get_symmetric_quantization_config, True),
        "int4": get_8da4w_config,
    }
    modes = MappingProxyType(
        {
            "static": functools.partial(get_symmetric_quantization_config, is_per_channel=True),
            "dynamic": functools.partial(get_symmetric_quantization_config, is_per_channel=True, is_dynamic=True),
            "dynamic_4bit": get_8da4w_config,
        }
    )
    lowers_to = "executorch"
