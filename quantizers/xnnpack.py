"""XNNPACKQuantizer: what ExecuTorch's XNNPACK backend runs in integers, and nothing else.

Activations are signed int8 with any zero point, weights int8 in [-127, 127] with zero point 0, per tensor or per output
channel; the bias stays float and becomes int32 inside the delegate. A value-preserving op has one scale for input and
output. Dynamic means: activation qparams are computed at run time, per row of the input.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from pt2e_quant.errors import SpecError
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
    QuantizationConfig,
    RuleQuantizer,
    clamp_to_hardtanh,
    lift_scalars,
    matmul_to_linear,
    mean_keeps_dims,
    one_scale,
    op,
    rule,
    same_as,
    split_to_slices,
)
from pt2e_quant.specs import QuantizationSpec, QuantizationSpecBase, is_per_channel

__all__ = ["RULES", "XNNPACKQuantizer", "get_8da4w_config", "get_symmetric_quantization_config"]

aten = torch.ops.aten

_EPS = 2**-12  # smallest scale: with less, the requantization multipliers of XNNPACK leave their fixed-point range
_HUGE = 1e6


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
    return QuantizationConfig(activation, None if is_dynamic else activation, weight)


def get_8da4w_config(group_size: int = 32) -> QuantizationConfig:
    """Linears only: int8 activations per row at run time, weights of 4 bits (-8..7) in groups, for decoders.

    Args:
        group_size: weights that share a scale, a multiple of 32. The scales are those of the least squared error,
            rounded to bfloat16, which is what XNNPACK stores: the converted graph computes with the same ones.

    Raises:
        SpecError: XNNPACK has no kernel for groups of that size.
    """
    if group_size < 32 or group_size % 32:
        raise SpecError(f"XNNPACK takes groups of a multiple of 32, got group_size={group_size}")
    weight = QuantizationSpec(
        dtype=torch.int8, quant_min=-8, quant_max=7, qscheme=torch.per_channel_symmetric, ch_axis=0,
        observer_or_fake_quant_ctr=PerGroupMSEObserver.with_args(
            group_size=group_size, eps=_EPS, scale_dtype=torch.bfloat16
        ),
    )  # fmt: skip
    return QuantizationConfig(get_symmetric_quantization_config(True, is_dynamic=True).input_activation, None, weight)


# Ops ------------------------------------------------------------------------------------------------------------------

conv = op(aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding)
padding = op(aten.pad.default, aten.constant_pad_nd.default)
conv_transpose = op(aten.conv_transpose1d.default, aten.conv_transpose2d.input)
linear = op(aten.linear.default)
activation = op(aten.relu.default, aten.relu6.default, aten.hardtanh.default)
rectify = op(aten.relu.default)
plus = op(aten.add.Tensor)
minus = op(aten.sub.Tensor, aten.subtract.Tensor)
times = op(aten.mul.Tensor, aten.multiply.Tensor)
concatenate = op(aten.cat.default, aten.concat.default, aten.concatenate.default)
mean_of = op(aten.mean.dim)
average = op(aten.adaptive_avg_pool2d.default)
maximum_of = op(aten.max_pool2d.default)
clamping = op(
    aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default, aten.clip.default,
    aten.clamp_min.default, aten.clamp_max.default,
)  # fmt: skip
reshaping = op(
    aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.permute.default,
    aten.transpose.int, aten.t.default, aten.numpy_T.default, aten.mT.default, aten.swapaxes.default,
    aten.swapdims.default, aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist,
    aten.ravel.default, aten._unsafe_view.default,
)  # fmt: skip
copying = op(
    aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default, aten.clone.default,
    aten.contiguous.default, aten.alias.default, aten.detach.default,
)  # fmt: skip
slicing = op(aten.slice.Tensor, aten.narrow.default, aten.select.int)
squeezing = op(aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
# Reasons for refusal --------------------------------------------------------------------------------------------------


def half_in_float(match: Match) -> str | None:
    """A multiplication is an integer one only when both of its sides are integers."""
    if _config(match).weight is None:
        return "the configuration keeps weights in float, so XNNPACK would multiply in float"
    if _config(match).input_activation is None:
        return "the configuration keeps activations in float, and XNNPACK has no weight-only kernel"
    return None


def not_static(match: Match) -> str | None:
    static = _config(match).output_activation is not None and not _config(match).is_dynamic
    return (
        None
        if static
        else "XNNPACK runs it in integers with static qparams only, which this configuration does not use"
    )


def dynamic_per_tensor(match: Match) -> str | None:
    if not _config(match).is_dynamic or is_per_channel(getattr(_config(match).weight, "qscheme", None)):
        return None
    return "XNNPACK's dynamic kernels need weights per channel; set is_per_channel=True"


def grouped_weights(match: Match) -> str | None:
    """Groups of weights: a static kernel has none, and rows must fill them."""
    size = _config(match).group_size
    if not size:
        return None
    w = match.value("w")
    if w is None or w.dim() != 2:
        return "XNNPACK's convolutions take one weight scale per channel, not one per group"
    if not _config(match).is_dynamic:
        return "XNNPACK takes groups of weights with dynamic activations only; set is_dynamic=True"
    return f"its {w.shape[1]} inputs do not split into groups of {size}" if w.shape[1] % size else None


def computed_parameters(match: Match) -> str | None:
    for name in ("w", "b"):
        if match.captures.get(name) is not None and not match.is_constant(name):
            return f"{match.captures[name]} is computed at run time; XNNPACK packs constant weights and biases only"
    return None


def unbatched(match: Match) -> str | None:
    x, w = match.value("x"), match.value("w")
    if x is None or w is None or x.dim() == w.dim():
        return None
    return "the input has no batch dimension; XNNPACK's convolutions need one"


def not_zero_padding(match: Match) -> str | None:
    mode, value, amounts = (match.argument(padding, name) for name in ("mode", "value", "pad"))
    if mode not in (None, "constant") or value:
        return f"mode={mode!r}, value={value}: XNNPACK's convolutions pad with zeros"
    crops = any(isinstance(amount, int) and amount < 0 for amount in amounts)
    return f"pad={list(amounts)}: it crops, XNNPACK's convolutions only pad" if crops else None


def not_dynamic_conv(match: Match) -> str | None:
    """Dynamic convolution: 2-d, not depthwise, and one image, since the kernel has one scale for each image."""
    x, w = match.value("x"), match.value("w")
    if not _config(match).is_dynamic or x is None or w is None:
        return None
    if w.dim() != 4:
        return "XNNPACK's dynamic convolutions are 2-d only"
    if w.shape[1] == 1:  # also an image of one channel: to XNNPACK that is depthwise
        return "XNNPACK has no dynamic depthwise convolution"
    if not isinstance(x.shape[0], int) or x.shape[0] != 1:
        return (
            f"its batch is {x.shape[0]}; XNNPACK's dynamic convolution has a scale for each image, the graph one in all"
        )
    return None


def grouped_transpose(match: Match) -> str | None:
    groups = match.argument(conv_transpose, "groups")
    if groups == 1 or not is_per_channel(getattr(_config(match).weight, "qscheme", None)):
        return None
    return f"groups={groups}; XNNPACK's transposed convolution with weights per channel takes groups=1"


def scaled_operand(match: Match) -> str | None:
    alpha = next((a for a in (match.argument(plus, "alpha"), match.argument(minus, "alpha")) if a is not None), 1)
    return f"alpha={alpha}; the integer kernel takes alpha=1" if alpha != 1 else None


def huge_constant(match: Match) -> str | None:
    """An attention mask of -1e9 and the like would take the whole range of the sum for itself."""
    for name in ("a", "b"):
        node = match.captures[name]
        if isinstance(node, Node) and node in match.constants and _largest(match.constants.value(node)) > _HUGE:
            return f"the constant {node} reaches beyond {_HUGE:g}; next to it all other values would round to one"
    return None


def scalar_operand(match: Match) -> str | None:
    for name in ("a", "b"):
        x = match.value(name)
        if x is not None and x.dim() == 0 and not match.is_constant(name):
            return f"{match.captures[name]} is a single number computed at run time; ExecuTorch fails to lower those"
    return None


def drops_values(match: Match) -> str | None:
    training = match.argument(copying, "train")
    return "captured in training mode, it drops values; call model.eval() before export" if training else None


def alone(match: Match) -> str | None:
    tensors = match.captures["tensors"]
    one = isinstance(tensors, tuple) and len(tensors) == 1
    return "XNNPACK concatenates two tensors or more" if one else None


def not_spatial_mean(match: Match) -> str | None:
    x, dims = match.value("x"), match.argument(mean_of, "dim")
    if match.argument(mean_of, "dtype") is not None:
        return f"dtype={match.argument(mean_of, 'dtype')}, which XNNPACK's mean does not convert to; leave it out"
    if (
        x is None
        or x.dim() != 4
        or sorted(dim % 4 for dim in dims or ()) != [2, 3]
        or not match.argument(mean_of, "keepdim")
    ):
        return "XNNPACK averages in integers over dimensions 2 and 3 of a 4-d tensor with keepdim=True only"
    return None


def not_to_one(match: Match) -> str | None:
    x, size = match.value("x"), match.argument(average, "output_size")
    one = list(size) in ([1], [1, 1]) and x is not None and x.dim() == 4
    return None if one else f"output size {list(size)}; XNNPACK pools in integers to 1 x 1 of a batch only"


def unusual_pool(match: Match) -> str | None:
    x, kernel = match.value("x"), _pair(match.argument(maximum_of, "kernel_size"))
    stride = _pair(match.argument(maximum_of, "stride") or kernel)
    if x is not None and x.dim() != 4:
        return "the input has no batch dimension; XNNPACK's max pooling needs one"
    if any(step > size for step, size in zip(stride, kernel, strict=True)):
        return f"stride {stride} is larger than the kernel {kernel}; XNNPACK's max pooling cannot skip"
    if match.argument(maximum_of, "ceil_mode") and x is not None and not all(isinstance(n, int) for n in x.shape):
        return "ceil_mode with dynamic shapes"
    return None


def stepped_slice(match: Match) -> str | None:
    x, step = match.value("x"), match.argument(slicing, "step")
    if step not in (None, 1):
        return f"step={step}; XNNPACK slices with step 1 only"
    return None if x is not None and all(isinstance(n, int) for n in x.shape) else "XNNPACK slices static shapes only"


def unknown_sizes(match: Match) -> str | None:
    """XNNPACK has neither squeeze nor an inner unsqueeze; lowering writes them as a view with at most one free size."""
    x = match.value("x")
    dynamic = [] if x is None else [size for size in x.shape if not isinstance(size, int)]
    return f"{len(dynamic)} sizes are dynamic; XNNPACK reshapes with one" if len(dynamic) > 1 else None


def _config(match: Match) -> QuantizationConfig:
    return match.config or QuantizationConfig(None, None, None)


def _largest(constant: Tensor) -> float:
    return float(constant.abs().max()) if constant.numel() and not constant.is_meta else 0.0


def _pair(value: Any) -> tuple[int, int]:
    items = value if isinstance(value, (list, tuple)) else (value,)
    return items[0], items[-1]


def rows(config: QuantizationConfig) -> QuantizationSpecBase | None:
    """The input of a linear. XNNPACK's dynamic linear has a scale for each row, so the graph must say so as well."""
    spec = config.input_activation
    if isinstance(spec, QuantizationSpec) and spec.is_dynamic:
        return replace(spec, observer_or_fake_quant_ctr=PerTokenPlaceholderObserver.with_args(eps=_EPS))
    return spec


PARAMETERS = (half_in_float, dynamic_per_tensor, grouped_weights, computed_parameters)


# Rules: the first that fits a node takes it ---------------------------------------------------------------------------


@rule(x=INPUT, w=WEIGHT, output=OUTPUT, unless=[*PARAMETERS, not_static, unbatched])
def conv_relu(x, w, b):
    """Also relu6 and hardtanh, with any bounds: they become the bounds of the kernel's output."""
    return activation(conv(x, w, b))


@rule(x=INPUT, w=WEIGHT, output=OUTPUT, unless=[*PARAMETERS, unbatched, not_dynamic_conv])
def conv_only(x, w, b):
    return conv(x, w, b)


@rule(x=INPUT, w=WEIGHT, output=OUTPUT, unless=[*PARAMETERS, not_static, unbatched, not_zero_padding])
def pad_conv_relu(x, w, b):
    """Zero padding before a convolution becomes the kernel's own, so nothing is quantized between the two."""
    return activation(conv(padding(x), w, b))


@rule(x=INPUT, w=WEIGHT, output=OUTPUT, unless=[*PARAMETERS, not_static, unbatched, not_zero_padding])
def pad_conv(x, w, b):
    return conv(padding(x), w, b)


@rule(x=INPUT, w=WEIGHT.at(1), output=OUTPUT, unless=[*PARAMETERS, not_static, unbatched, grouped_transpose])
def conv_transpose_relu(x, w, b):
    """The weight of a transposed convolution is (in, out / groups, *kernel): channels on axis 1."""
    return activation(conv_transpose(x, w, b))


@rule(x=INPUT, w=WEIGHT.at(1), output=OUTPUT, unless=[*PARAMETERS, not_static, unbatched, grouped_transpose])
def conv_transpose_only(x, w, b):
    return conv_transpose(x, w, b)


@rule(x=rows, w=WEIGHT, output=OUTPUT, unless=[*PARAMETERS, not_static])
def linear_relu(x, w, b):
    return activation(linear(x, w, b))


@rule(x=rows, w=WEIGHT, output=OUTPUT, unless=PARAMETERS)
def linear_only(x, w, b):
    """mm, matmul and addmm with a constant second operand arrive here too, see `matmul_to_linear`."""
    return linear(x, w, b)


@rule(a=INPUT, b=INPUT, output=OUTPUT, unless=[not_static, scaled_operand, scalar_operand, huge_constant])
def add_relu(a, b):
    """Only relu: with other bounds XNNPACK adds in float. Those stay after an integer add of their own."""
    return rectify(plus(a, b))


@rule(a=INPUT, b=INPUT, output=OUTPUT, unless=[not_static, scaled_operand, scalar_operand, huge_constant])
def add(a, b):
    return plus(a, b)


@rule(a=INPUT, b=INPUT, output=OUTPUT, unless=[not_static, scaled_operand, scalar_operand, huge_constant])
def sub(a, b):
    return minus(a, b)


@rule(a=INPUT, b=INPUT, output=OUTPUT, unless=[not_static, scalar_operand, huge_constant])
def mul(a, b):
    """A relu after it is not fused: XNNPACK would run both in float. As two integer kernels the relu is exact."""
    return times(a, b)


@rule(tensors=one_scale(INPUT), output=same_as("tensors"), unless=[not_static, alone])
def cat(*tensors):
    return concatenate(tensors)


@rule(x=INHERIT, output=OUTPUT, unless=[not_static, not_spatial_mean])
def mean(x):
    """The mean of many integers is finer than their step, so it gets a scale of its own."""
    return mean_of(x)


@rule(x=INHERIT, output=OUTPUT, unless=[not_static, not_to_one])
def adaptive_avg_pool2d(x):
    return average(x)


@rule(x=INHERIT, output=same_as("x"), unless=[unusual_pool])
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


@rule(x=INHERIT, output=same_as("x"), unless=[stepped_slice])
def slice_(x):
    return slicing(x)


@rule(x=INHERIT, output=same_as("x"), unless=[unknown_sizes])
def squeeze(x):
    return squeezing(x)


RULES = (
    pad_conv_relu, pad_conv, conv_relu, conv_only, conv_transpose_relu, conv_transpose_only, linear_relu, linear_only,
    add_relu, add, sub, mul, cat, mean, adaptive_avg_pool2d, max_pool2d, clamp, reshape, copy, slice_,
    squeeze,
)  # fmt: skip


IN_FLOAT = (
    aten.abs.default, aten.avg_pool2d.default, aten.baddbmm.default, aten.batch_norm.default, aten.bmm.default,
    aten.ceil.default, aten.channel_shuffle.default, aten.constant_pad_nd.default, aten.cos.default, aten.div.Tensor,
    aten.exp.default, aten.expand.default, aten.floor.default, aten.gelu.default, aten.glu.default,
    aten.hardswish.default, aten.layer_norm.default, aten.leaky_relu.default, aten.log.default, aten.maximum.default,
    aten.minimum.default, aten.neg.default, aten.pad.default, aten.pixel_shuffle.default, aten.pixel_unshuffle.default,
    aten.prelu.default, aten.rms_norm.default, aten.rsqrt.default, aten.rsub.Scalar, aten.sigmoid.default,
    aten.silu.default, aten.sin.default, aten.softmax.int, aten.sqrt.default, aten.square.default, aten.stack.default,
    aten.tanh.default, aten.upsample_bilinear2d.vec,
)  # fmt: skip
OUTSIDE = (
    aten.amax.default, aten.conv3d.default, aten.conv3d.padding, aten.conv_transpose3d.input, aten.cumsum.default,
    aten.elu.default, aten.embedding.default, aten.erf.default, aten.flip.default, aten.group_norm.default,
    aten.index.Tensor, aten.instance_norm.default, aten.log_softmax.int, aten.masked_fill.Scalar,
    aten.max_pool1d.default, aten.mean.default, aten.reciprocal.default, aten.repeat.default, aten.round.default,
    aten.sum.dim_IntList, aten.tile.default, aten.upsample_nearest2d.vec,
)  # fmt: skip
OF_ACTIVATIONS = (aten.mm.default, aten.matmul.default, aten.addmm.default)


REASONS = MappingProxyType(
    dict.fromkeys(IN_FLOAT, "XNNPACK runs it in float, inside the delegate")
    | dict.fromkeys(OUTSIDE, "XNNPACK has no kernel for it, so it stays a portable float kernel")
    | dict.fromkeys(OF_ACTIVATIONS, "both factors are computed at run time, and XNNPACK multiplies those in float only")
)


class XNNPACKQuantizer(RuleQuantizer):
    """Annotates what XNNPACK runs in integers; the report says why it leaves the rest.

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    """

    rules = RULES
    reasons = REASONS
    transforms = (matmul_to_linear, mean_keeps_dims, clamp_to_hardtanh, lift_scalars, split_to_slices)
    decompose = frozenset({"sdpa", "rnn"})
