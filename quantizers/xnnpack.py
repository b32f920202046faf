"""XNNPACKQuantizer: what ExecuTorch's XNNPACK backend runs in integers, and nothing else.

Activations are signed int8 with any zero point, weights int8 in [-127, 127] with zero point 0, per tensor or per output
channel; the bias stays float and becomes int32 inside the delegate. A value-preserving op has one scale for input and
output. Dynamic means: activation qparams are computed at run time, per row of the input.
"""

from __future__ import annotations

import torch

from pt2e_quant.errors import SpecError
from pt2e_quant.observer import HistogramObserver, MinMaxObserver, PerChannelMinMaxObserver, PlaceholderObserver
from pt2e_quant.quantizer import (
    INHERIT,
    INPUT,
    OUTPUT,
    WEIGHT,
    Match,
    QuantizationConfig,
    RuleQuantizer,
    lift_scalars,
    one_scale,
    op,
    rule,
    same_as,
)
from pt2e_quant.specs import QuantizationSpec, is_per_channel

__all__ = ["RULES", "XNNPACKQuantizer", "get_symmetric_quantization_config"]

aten = torch.ops.aten

_EPS = 2**-12  # smallest scale that XNNPACK's fixed-point requantization handles well


def get_symmetric_quantization_config(
    is_per_channel: bool = False,
    is_qat: bool = False,
    is_dynamic: bool = False,
    act_qmin: int = -128,
    act_qmax: int = 127,
    weight_qmin: int = -127,
    weight_qmax: int = 127,
) -> QuantizationConfig:
    """int8 activations (asymmetric) and int8 weights (symmetric).

    Args:
        is_per_channel: one weight scale per output channel instead of one in all. Dynamic needs it.
        is_qat: fake-quantizers for training; not available yet, see Raises.
        is_dynamic: activation qparams at run time; needs no calibration data, works for linear and conv2d.
        act_qmin, act_qmax, weight_qmin, weight_qmax: bounds of the integers, both included.

    Raises:
        SpecError: a range is not one of int8, or is_qat is set.
    """
    if is_qat:
        raise SpecError("quantization-aware training is not part of this release; use is_qat=False")
    activation = QuantizationSpec(
        dtype=torch.int8,
        quant_min=act_qmin,
        quant_max=act_qmax,
        qscheme=torch.per_tensor_affine,
        is_dynamic=is_dynamic,
        observer_or_fake_quant_ctr=(PlaceholderObserver if is_dynamic else HistogramObserver).with_args(eps=_EPS),
    )
    weight = QuantizationSpec(
        dtype=torch.int8,
        quant_min=weight_qmin,
        quant_max=weight_qmax,
        qscheme=torch.per_channel_symmetric if is_per_channel else torch.per_tensor_symmetric,
        ch_axis=0 if is_per_channel else None,
        observer_or_fake_quant_ctr=(PerChannelMinMaxObserver if is_per_channel else MinMaxObserver).with_args(eps=_EPS),
    )
    return QuantizationConfig(activation, None if is_dynamic else activation, weight)


# Ops ------------------------------------------------------------------------------------------------------------------

conv = op(aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding)
conv_transpose = op(aten.conv_transpose1d.default, aten.conv_transpose2d.input)
linear = op(aten.linear.default)
addmm = op(aten.addmm.default)
mm = op(aten.mm.default, aten.matmul.default)
activation = op(aten.relu.default, aten.relu6.default, aten.hardtanh.default)
plus = op(aten.add.Tensor)
minus = op(aten.sub.Tensor)
times = op(aten.mul.Tensor)
concatenate = op(aten.cat.default)


# Reasons for refusal ---------------------------------------------------------------------------------------------------

def not_integer(match: Match) -> str | None:
    """The configuration leaves one side of a multiplication in float."""
    config = match.config
    if config is None or config.weight is None:
        return "weights in float: XNNPACK would run it in float"
    if config.input_activation is None:
        return "activations in float: XNNPACK has no weight-only kernels"
    return None


def not_static(match: Match) -> str | None:
    if match.config is None or match.config.output_activation is None or match.config.is_dynamic:
        return "XNNPACK runs this op in integers with static qparams only, the configuration has none"
    return None


def per_tensor_dynamic(match: Match) -> str | None:
    if match.config is not None and match.config.is_dynamic and not is_per_channel(getattr(match.config.weight, "qscheme", None)):
        return "dynamic kernels of XNNPACK need weights per channel: get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)"
    return None


def computed_weight(match: Match) -> str | None:
    return None if match.is_constant("w") else "its weight is computed at run time, XNNPACK packs constant weights only"


def computed_bias(match: Match) -> str | None:
    missing = match.captures.get("b") is None
    return None if missing or match.is_constant("b") else "its bias is computed at run time, XNNPACK packs constant biases only"


def two_dimensional_dynamic(match: Match) -> str | None:
    if match.config is None or not match.config.is_dynamic:
        return None
    weight = match.value("w")
    groups = match.argument(conv, "groups")
    if weight is not None and weight.dim() != 4:
        return "XNNPACK has dynamic kernels for 2-d convolutions only"
    return f"groups={groups}, dynamic convolutions of XNNPACK take 1" if groups != 1 else None


def grouped_transpose(match: Match) -> str | None:
    groups = match.argument(conv_transpose, "groups")
    return f"groups={groups}, transposed convolutions of XNNPACK take 1" if groups != 1 else None


def dilated_transpose(match: Match) -> str | None:
    return "XNNPACK has no dynamic transposed convolution" if match.config is not None and match.config.is_dynamic else None


def scaled(match: Match) -> str | None:
    alpha = match.argument(plus, "alpha") or match.argument(minus, "alpha")
    return f"alpha={alpha}, the integer kernel takes 1" if alpha not in (None, 1) else None


def pool_to_one(match: Match) -> str | None:
    return None


PARAMETERS = (not_integer, per_tensor_dynamic, computed_weight, computed_bias)


# Rules: the first that fits a node takes it -----------------------------------------------------------------------------


@rule(x=INPUT, w=WEIGHT, output=OUTPUT, unless=[*PARAMETERS, not_static])
def conv_relu(x, w, b):
    return activation(conv(x, w, b))


@rule(x=INPUT, w=WEIGHT, output=OUTPUT, unless=[*PARAMETERS, two_dimensional_dynamic])
def conv_alone(x, w, b):
    return conv(x, w, b)


@rule(x=INPUT, w=WEIGHT.at(1), output=OUTPUT, unless=[*PARAMETERS, grouped_transpose, not_static])
def conv_transpose_relu(x, w, b):
    return activation(conv_transpose(x, w, b))


@rule(x=INPUT, w=WEIGHT.at(1), output=OUTPUT, unless=[*PARAMETERS, grouped_transpose, not_static])
def conv_transpose_alone(x, w, b):
    return conv_transpose(x, w, b)


@rule(x=INPUT, w=WEIGHT, output=OUTPUT, unless=[*PARAMETERS, not_static])
def linear_relu(x, w, b):
    return activation(linear(x, w, b))


@rule(x=INPUT, w=WEIGHT, output=OUTPUT, unless=PARAMETERS)
def linear_alone(x, w, b):
    return linear(x, w, b)


@rule(a=INPUT, b=INPUT, output=OUTPUT, unless=[not_static, scaled])
def add_relu(a, b):
    return activation(plus(a, b))


@rule(a=INPUT, b=INPUT, output=OUTPUT, unless=[not_static, scaled])
def add(a, b):
    return plus(a, b)


@rule(a=INPUT, b=INPUT, output=OUTPUT, unless=[not_static, scaled])
def sub(a, b):
    return minus(a, b)


@rule(a=INPUT, b=INPUT, output=OUTPUT, unless=[not_static])
def mul_relu(a, b):
    return activation(times(a, b))


@rule(a=INPUT, b=INPUT, output=OUTPUT, unless=[not_static])
def mul(a, b):
    return times(a, b)


@rule(tensors=one_scale(INPUT), output=same_as("tensors"), unless=[not_static])
def cat(*tensors):
    return concatenate(tensors)


RULES = (
    conv_relu, conv_alone, conv_transpose_relu, conv_transpose_alone, linear_relu, linear_alone,
    add_relu, add, sub, mul_relu, mul, cat,
)  # fmt: skip


class XNNPACKQuantizer(RuleQuantizer):
    rules = RULES
    transforms = (lift_scalars,)
