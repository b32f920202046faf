"""X86InductorQuantizer: what Inductor runs with oneDNN's integer kernels on x86, and nothing else.

Activations are uint8 per tensor, weights int8 per output channel with zero point 0, biases stay float. A convolution or
linear may end in float, so an output is quantized only where something that runs in integers reads it. Ops that only
move values move the integers. Dynamic means: the qparams of a linear's input are computed at run time, one pair for the
whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.nn import functional

from pt2e_quant.errors import SpecError, TargetingError
from pt2e_quant.observer import HistogramObserver, PerChannelMinMaxObserver, PlaceholderObserver
from pt2e_quant.quantizer import (
    INHERIT,
    INPUT,
    OUTPUT,
    WEIGHT,
    Match,
    QuantizationConfig,
    RuleQuantizer,
    clamp_to_hardtanh,
    fold_zero_padding,
    matmul_to_linear,
    one_scale,
    op,
    rule,
    same_as,
    split_to_slices,
)
from pt2e_quant.specs import QuantizationSpec

__all__ = [
    "RULES",
    "X86InductorQuantizer",
    "get_default_x86_inductor_quantization_config",
    "get_x86_inductor_linear_dynamic_fp16_config",
    "get_x86_inductor_weight_only_quantization_config",
]

aten = torch.ops.aten

_FEW = 8


def get_default_x86_inductor_quantization_config(
    is_qat: bool = False, is_dynamic: bool = False, reduce_range: bool = False
) -> QuantizationConfig:
    """uint8 activations (asymmetric) and int8 weights (symmetric, one scale per output channel).

    Args:
        is_qat: fake-quantizers for training; not available yet, see Raises.
        is_dynamic: activation qparams at run time; needs no calibration data, works for linear.
        reduce_range: activations in [0, 127]. For processors without VNNI: there, two products of 8 bits are added
            in 16 bits, which overflow from 128 on. The lowering tells when a machine needs it.

    Raises:
        SpecError: is_qat is set.
    """
    if is_qat:
        raise SpecError("quantization-aware training is not part of this release; use is_qat=False")
    activation = QuantizationSpec(
        dtype=torch.uint8,
        quant_min=0,
        quant_max=127 if reduce_range else 255,
        qscheme=torch.per_tensor_affine,
        is_dynamic=is_dynamic,
        observer_or_fake_quant_ctr=PlaceholderObserver if is_dynamic else HistogramObserver,
    )
    return QuantizationConfig(activation, None if is_dynamic else activation, _per_channel_int8())


def get_x86_inductor_linear_dynamic_fp16_config() -> QuantizationConfig:
    """Linear with its weight in float16 and activations in float32; needs no calibration data."""
    weight = QuantizationSpec(dtype=torch.float16, observer_or_fake_quant_ctr=PlaceholderObserver)
    return QuantizationConfig(None, None, weight)


def get_x86_inductor_weight_only_quantization_config() -> QuantizationConfig:
    """Linear and embedding with int8 weights, one scale per row, and float activations; needs no calibration data."""
    return QuantizationConfig(None, None, _per_channel_int8())


def _per_channel_int8() -> QuantizationSpec:
    # No floor under the scale but float32's own: oneDNN multiplies by float scales, and a floor of 2**-12 as in the
    # reference costs channels with weights below 0.03 their precision.
    return QuantizationSpec(
        dtype=torch.int8,
        quant_min=-128,
        quant_max=127,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        observer_or_fake_quant_ctr=PerChannelMinMaxObserver,
    )


# Ops ------------------------------------------------------------------------------------------------------------------

conv = op(aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding)
linear = op(aten.linear.default)
rectify = op(aten.relu.default)
after_conv = op(
    aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.hardswish.default, aten.silu.default
)  # fmt: skip
after_linear = op(aten.relu.default, aten.gelu.default)
plus = op(aten.add.Tensor)
product = op(aten.matmul.default, aten.bmm.default)
concatenate = op(aten.cat.default, aten.concat.default, aten.concatenate.default)
maximum_of = op(aten.max_pool2d.default)
average = op(aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.mean.dim)
lookup = op(aten.embedding.default)
padding = op(aten.pad.default, aten.constant_pad_nd.default)
copying = op(
    aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default, aten.clone.default,
    aten.contiguous.default, aten.alias.default, aten.detach.default,
)  # fmt: skip
reshaping = op(
    aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.ravel.default,
    aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.permute.default, aten.transpose.int, aten.t.default, aten.numpy_T.default, aten.mT.default,
    aten.swapaxes.default, aten.swapdims.default, aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int,
    aten.moveaxis.intlist, aten.slice.Tensor, aten.narrow.default, aten.select.int, aten.channel_shuffle.default,
    aten.pixel_shuffle.default, aten.pixel_unshuffle.default,
)  # fmt: skip
# Reasons for refusal --------------------------------------------------------------------------------------------------


def not_static(match: Match) -> str | None:
    config = _config(match)
    if config.is_dynamic:
        return "its qparams would be computed at run time, which Inductor has for linear only"
    if config.input_activation is None or config.output_activation is None:
        return "the configuration keeps activations in float, so Inductor computes in float"
    return None


def no_integer_kernel(match: Match) -> str | None:
    """oneDNN multiplies uint8 by int8 per output channel."""
    weight, activation = _config(match).weight, _config(match).input_activation
    if not isinstance(weight, QuantizationSpec):
        return "the configuration keeps weights in float, so Inductor would multiply in float"
    if weight.dtype is not torch.int8 or weight.qscheme is not torch.per_channel_symmetric:
        return "Inductor's integer kernels take int8 weights with torch.per_channel_symmetric"
    if isinstance(activation, QuantizationSpec) and activation.dtype is not torch.uint8:
        dtype = str(activation.dtype).removeprefix("torch.")
        return f"{dtype} activations: Inductor's convolution fails on signed ones when it runs; use torch.uint8"
    return None


def not_linear_scheme(match: Match) -> str | None:
    """Beyond `no_integer_kernel`: float16 weights, and int8 weights alone, both with float activations."""
    config, w = _config(match), match.value("w")
    if isinstance(config.weight, QuantizationSpec) and config.weight.dtype is torch.float16:
        mixed = config.input_activation is not None
        return "float16 weights go with float activations; set input_activation=None" if mixed else None
    if config.is_weight_only and w is not None and w.shape[0] <= _FEW:
        return f"it has {w.shape[0]} outputs, Inductor's kernel for int8 weights alone takes more than {_FEW}"
    return no_integer_kernel(match)


def not_weight_only(match: Match) -> str | None:
    if not match.explicit and not _config(match).is_weight_only:
        return "a table of integers saves memory, not time; ask for it with set_function_type_qconfig(F.embedding, ...)"
    return (
        "its table is no int8, which is what Inductor looks up"
        if getattr(_config(match).weight, "dtype", None) is not torch.int8
        else None
    )


def not_asked_for(match: Match) -> str | None:
    if match.explicit:
        return None
    return "Inductor multiplies two activations in float; set_function_type_qconfig(torch.matmul, ...) quantizes them"


def not_float32(match: Match) -> str | None:
    x = match.value("x")
    if x is None or x.dtype is torch.float32:
        return None
    return f"the input is {str(x.dtype).removeprefix('torch.')}; Inductor matches integer patterns in float32 models"


def computed_parameters(match: Match) -> str | None:
    for name in ("w", "b"):
        if match.captures.get(name) is not None and not match.is_constant(name):
            return f"{match.captures[name]} is computed at run time, Inductor packs constant weights and biases only"
    return None


def unbatched(match: Match) -> str | None:
    x, w = match.value("x"), match.value("w")
    if x is None or w is None or (x.dim() == w.dim() or (w.dim() == 2 and x.dim() > 2)):
        return None
    return "the input has no batch dimension, Inductor's integer kernels need one"


def uneven_same_padding(match: Match) -> str | None:
    w = match.value("w")
    if match.argument(conv, "padding") != "same" or w is None:
        return None
    spans = [(size - 1) * step for size, step in zip(w.shape[2:], _steps(match, w.dim() - 2), strict=True)]
    return "padding='same' pads unevenly here, oneDNN pads both sides alike" if any(s % 2 for s in spans) else None


def not_in_place_sum(match: Match) -> str | None:
    """oneDNN adds into the memory of the other operand, on the same shape; Inductor checks that at compile time."""
    if match.argument(plus, "alpha") not in (None, 1):
        return f"alpha={match.argument(plus, 'alpha')}, the kernel adds with 1"
    other, x = match.captures["other"], match.captures["x"]
    if match.is_constant("other"):
        return "it adds a constant"
    if other is x:
        return "it adds its own input, the kernel would overwrite what it still reads"
    if isinstance(other, Node) and other.target in (*reshaping.targets, *copying.targets):
        return "it adds a view of another tensor, the kernel needs memory of its own"
    return _shapes_differ(match)


def not_fused_sum(match: Match) -> str | None:
    if match.argument(plus, "alpha") not in (None, 1):
        return f"alpha={match.argument(plus, 'alpha')}, the kernel adds with 1"
    return "it adds a constant" if match.is_constant("other") else _shapes_differ(match)


def _shapes_differ(match: Match) -> str | None:
    other, whole = match.value("other"), match.root.meta.get("val")
    inner = next(node for declared, node in match.calls if declared in (conv, linear)).meta.get("val")
    if other is None or inner is None or whole is None:
        return None
    return None if other.shape == inner.shape else "its operands have different shapes, the kernel does not broadcast"


def unusual_pool(match: Match) -> str | None:
    x, mode = match.value("x"), match.argument(maximum_of, "ceil_mode")
    if x is not None and x.dim() != 4:
        return "the input has no batch dimension, Inductor's integer max pooling needs one"
    return "ceil_mode with dynamic shapes" if mode and x is not None and _is_dynamic(x) else None


def converts(match: Match) -> str | None:
    dtype = match.argument(average, "dtype")
    return f"dtype={dtype}: it converts; leave it out" if dtype is not None else None


def drops_values(match: Match) -> str | None:
    training = match.argument(copying, "train")
    return "captured in training mode, it drops values; call model.eval() before export" if training else None


def not_zero_padding(match: Match) -> str | None:
    mode, value = match.argument(padding, "mode"), match.argument(padding, "value")
    if mode not in (None, "constant") or value:
        return f"mode={mode!r}, value={value}: only zeros are padded in integers"
    return None


def _config(match: Match) -> QuantizationConfig:
    return match.config or QuantizationConfig(None, None, None)


def _steps(match: Match, dimensions: int) -> list[int]:
    dilation = match.argument(conv, "dilation")
    given = list(dilation) if isinstance(dilation, (list, tuple)) else [dilation]
    return given * dimensions if len(given) == 1 else given


def _is_dynamic(x: torch.Tensor) -> bool:
    return not all(isinstance(size, int) for size in x.shape)


CONV = (not_static, no_integer_kernel, computed_parameters, not_float32, unbatched, uneven_same_padding)
LINEAR = (not_linear_scheme, computed_parameters, not_float32, unbatched)


# Rules: the first that fits a node takes it ---------------------------------------------------------------------------


@rule(x=INPUT, w=WEIGHT, other=INPUT, output=OUTPUT, unless=[*CONV, not_in_place_sum])
def conv_add_relu(x, w, b, other):
    """The sum goes into the memory of the other operand, which has a scale of its own."""
    return rectify(plus(conv(x, w, b), other))


@rule(x=INPUT, w=WEIGHT, other=INPUT, output=OUTPUT, unless=[*CONV, not_in_place_sum])
def conv_add(x, w, b, other):
    return plus(conv(x, w, b), other)


@rule(x=INPUT, w=WEIGHT, output=OUTPUT, unless=CONV)
def conv_unary(x, w, b):
    """relu, relu6 and hardtanh with any bounds, hardswish, silu."""
    return after_conv(conv(x, w, b))


@rule(x=INPUT, w=WEIGHT, output=OUTPUT, unless=CONV)
def conv_only(x, w, b):
    return conv(x, w, b)


@rule(x=INPUT, w=WEIGHT, unless=[*LINEAR, not_fused_sum])
def linear_add_relu(x, w, b, other):
    """The other operand stays float, as does the sum: residual streams keep their precision."""
    return rectify(plus(linear(x, w, b), other))


@rule(x=INPUT, w=WEIGHT, unless=[*LINEAR, not_fused_sum])
def linear_add(x, w, b, other):
    return plus(linear(x, w, b), other)


@rule(x=INPUT, w=WEIGHT, output=OUTPUT, unless=LINEAR)
def linear_unary(x, w, b):
    """relu, gelu with erf or tanh."""
    return after_linear(linear(x, w, b))


@rule(x=INPUT, w=WEIGHT, output=OUTPUT, unless=LINEAR)
def linear_only(x, w, b):
    """mm, matmul and addmm with a constant second operand arrive here too, see `matmul_to_linear`."""
    return linear(x, w, b)


@rule(a=INPUT, b=INPUT, unless=[not_asked_for, not_static])
def matmul(a, b):
    """The operands travel as integers, the product is computed in float: Inductor has no integer kernel for it."""
    return product(a, b)


@rule(w=WEIGHT, unless=[not_weight_only])
def embedding(w, index):
    return lookup(w, index)


@rule(tensors=one_scale(INPUT), output=same_as("tensors"), unless=[not_static])
def cat(*tensors):
    return concatenate(tensors)


@rule(x=INHERIT, output=same_as("x"), unless=[unusual_pool])
def max_pool2d(x):
    return maximum_of(x)


@rule(x=INHERIT, output=OUTPUT, unless=[not_static, converts])
def average_pool(x):
    """The mean of many integers is finer than their step, so it gets a scale of its own."""
    return average(x)


@rule(x=INHERIT, output=same_as("x"))
def move(x):
    return reshaping(x)


@rule(x=INHERIT, output=same_as("x"), unless=[drops_values])
def copy(x):
    return copying(x)


@rule(x=INHERIT, output=same_as("x"), unless=[not_zero_padding])
def pad(x):
    return padding(x)


RULES = (
    conv_add_relu, conv_add, conv_unary, conv_only, linear_add_relu, linear_add, linear_unary, linear_only, matmul,
    embedding, cat, max_pool2d, average_pool, move, copy, pad,
)  # fmt: skip

_TRANSPOSED = "Inductor takes its weight for that of an ordinary convolution and computes wrong numbers"
_FUSED = "Inductor computes it in float, in one loop with its neighbours"
REASONS = MappingProxyType(
    dict.fromkeys(
        (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input), _TRANSPOSED
    )
    | dict.fromkeys((aten.conv3d.default, aten.conv3d.padding), "Inductor has integer convolutions in 1-d and 2-d only")
    | dict.fromkeys(
        (
            aten.add.Tensor, aten.clamp.default, aten.sub.Tensor,
            aten.mul.Tensor, aten.div.Tensor, aten.relu.default, aten.sigmoid.default,
            aten.tanh.default, aten.hardswish.default, aten.hardsigmoid.default, aten.silu.default, aten.gelu.default,
            aten.elu.default, aten.leaky_relu.default, aten.softmax.int, aten.layer_norm.default,
            aten.group_norm.default, aten.batch_norm.default, aten.upsample_nearest2d.vec,
            aten.upsample_bilinear2d.vec, aten.hardtanh.default, aten.relu6.default, aten.exp.default,
        ),
        _FUSED,
    )
    | {aten.scaled_dot_product_attention.default: "the attention kernels of Inductor compute in float"}
)  # fmt: skip


class X86InductorQuantizer(RuleQuantizer):
    """Annotates what Inductor runs in integers on x86; the report says why it leaves the rest.

    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())

    matmul is quantized only where a selector narrower than the global one asks for it.
    """

    rules = RULES
    reasons = REASONS
    transforms = (matmul_to_linear, clamp_to_hardtanh, fold_zero_padding, split_to_slices)
    trims_outputs = True

    def get_global_quantization_config(self) -> QuantizationConfig | None:
        """What `set_global` was given last; None before."""
        return self.global_config

    def set_function_type_qconfig(
        self, function_type: Callable[..., Any], quantization_config: QuantizationConfig | None
    ) -> X86InductorQuantizer:
        """Configuration of a function (torch.matmul, torch.nn.functional.linear) wherever it is called.

        Raises:
            TargetingError: no ATen operator belongs to the function.
        """
        return self.set_operator_type(_operator(function_type), quantization_config)

    def set_module_type_qconfig(
        self, module_type: type[nn.Module] | str, quantization_config: QuantizationConfig | None
    ) -> X86InductorQuantizer:
        """Configuration of all ops inside modules of a class: `set_module_type` under the name of the reference."""
        return self.set_module_type(module_type, quantization_config)

    def set_module_name_qconfig(
        self, module_name: str, quantization_config: QuantizationConfig | None
    ) -> X86InductorQuantizer:
        """Configuration of all ops inside a module: `set_module_name` under the name of the reference."""
        return self.set_module_name(module_name, quantization_config)


_DISPATCHED = MappingProxyType(
    {functional.max_pool1d: "max_pool1d", functional.max_pool2d: "max_pool2d", functional.max_pool3d: "max_pool3d"}
)


def _operator(function: Any) -> Any:
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return function
    name = _DISPATCHED.get(function) or getattr(function, "__name__", "")
    if not name or not hasattr(aten, name):
        raise TargetingError(
            f"no operator belongs to {function!r}; pass a function of torch or torch.nn.functional, or an operator "
            "such as torch.ops.aten.linear.default"
        )
    return getattr(aten, name)
