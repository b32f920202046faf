"""Rules of what Inductor runs with oneDNN's integer kernels, and the reasons why not, for every processor that it has.

A backend (x86, Arm, Intel GPUs) takes the rules that its processor has kernels for and puts before their reasons
those against number formats that it lacks: `refusing(rules, reason)`. A convolution or linear may end in float, so an
output is quantized only where something that runs in integers reads it. Ops that only move values move the integers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Node

from pt2e_quant import ops
from pt2e_quant.lowering.inductor import limits
from pt2e_quant.observer import PerChannelMinMaxObserver
from pt2e_quant.quantizer import (
    INHERIT,
    INPUT,
    OUTPUT,
    WEIGHT,
    Match,
    Rule,
    because,
    one_scale,
    op,
    rule,
    same_as,
)
from pt2e_quant.specs import QuantizationSpec, uneven_groups

from .common import computed_table, config_of, copying, drops_values

__all__ = [
    "CONVOLUTIONS",
    "LINEARS",
    "NO_TABLES",
    "REASONS",
    "average_pool",
    "cat",
    "conv_only",
    "copy",
    "embedding",
    "embedding_bag",
    "float_activations",
    "lacking",
    "linear_only",
    "matmul",
    "max_pool2d",
    "move",
    "not_8_bits",
    "not_static",
    "not_unsigned",
    "pad",
    "per_channel_int8",
    "refusing",
    "run_time_qparams",
    "weight_format",
]

aten = torch.ops.aten


def refusing(rules: tuple[Rule, ...], *reasons: Callable[[Match], str | None]) -> tuple[Rule, ...]:
    """The same rules with more reasons to refuse a match, asked before their own."""
    return tuple(replace(rule, unless=(*reasons, *rule.unless)) for rule in rules)


def lacking(reason: str, *rules: Rule) -> dict[Any, str]:
    """The reason by operator, for rules that a processor has no kernels for: an addition to REASONS."""
    return {target: reason for rule in rules for target in rule.pattern.root.op.targets}


def per_channel_int8() -> QuantizationSpec:
    """Weights: symmetric, one scale for each output channel."""
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

conv, linear = op(*ops.CONV1D, *ops.CONV2D), op(*ops.LINEAR)
rectify, plus = op(*ops.RELU), op(*ops.ADD)
after_conv, after_linear = op(*limits.AFTER_CONV), op(*limits.AFTER_LINEAR)
product = op(aten.matmul.default, aten.bmm.default)
concatenate, padding = op(*ops.CAT), op(*ops.PAD)
maximum_of = op(aten.max_pool2d.default)
average = op(aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.mean.dim)
lookup, lookup_bags = op(aten.embedding.default), op(*ops.EMBEDDING_BAG)
reshaping = op(*limits.MOVES)


# Reasons for refusal --------------------------------------------------------------------------------------------------


_IN_FLOAT = because("configuration", "the configuration keeps activations in float, so Inductor computes in float")


def run_time_qparams(match: Match) -> str | None:
    why = "its qparams would be computed at run time, which Inductor supports for linear only"
    return because("configuration", why) if config_of(match).is_dynamic else None


def float_activations(match: Match) -> str | None:
    return _IN_FLOAT if config_of(match).input_activation is None else None


def not_static(match: Match) -> str | None:
    """For what has an output to quantize."""
    reason = run_time_qparams(match) or float_activations(match)
    return _IN_FLOAT if reason is None and config_of(match).output_activation is None else reason


def weight_format(match: Match) -> str | None:
    weight = config_of(match).weight
    if not isinstance(weight, QuantizationSpec):
        return because("configuration", "the configuration keeps weights in float, so Inductor would multiply in float")
    if weight.dtype is not torch.int8 or weight.qscheme is not torch.per_channel_symmetric:
        return because("configuration", "Inductor's integer kernels take int8 weights with torch.per_channel_symmetric")
    if config_of(match).group_size and not config_of(match).is_weight_only:
        return because("configuration", "weights in groups need float activations; set input_activation=None")
    return None


def not_unsigned(match: Match) -> str | None:
    """On processors; Intel GPUs take both."""
    return limits.signed_convolution(_activation(match))


def not_8_bits(match: Match) -> str | None:
    return limits.not_8_bits(_activation(match))


def _activation(match: Match) -> torch.dtype:
    spec = config_of(match).input_spec
    return torch.uint8 if spec is None or spec.dtype is None else spec.dtype


def _weight(match: Match) -> torch.dtype | None:
    spec = config_of(match).weight_spec
    return None if spec is None else spec.dtype


def not_weight_only(match: Match) -> str | None:
    if not match.explicit and not config_of(match).is_weight_only:
        why = "a table of integers saves memory, not time; ask for it with set_function_type_qconfig(F.embedding, ...)"
        return because("not_asked_for", why)
    why = "its table is not int8, which is what Inductor looks up"
    return None if _weight(match) is torch.int8 else because("configuration", why)


def uneven_rows(match: Match) -> str | None:
    w = match.value("w")
    return None if w is None else uneven_groups(w.shape[1], min(config_of(match).group_size, w.shape[1]))


def no_kernel_for_bags(match: Match) -> str | None:
    mode, left_out = match.argument(lookup_bags, "mode"), match.argument(lookup_bags, "padding_idx")
    return limits.bags(mode, left_out, grouped=bool(config_of(match).group_size))


def not_asked_for(match: Match) -> str | None:
    if match.explicit:
        return None
    why = "Inductor multiplies two activations in float; set_function_type_qconfig(torch.matmul, ...) quantizes them"
    return because("not_asked_for", why)


def half_weights_in_half_models(match: Match) -> str | None:
    x = match.value("x")
    return limits.half_weights(x.dtype) if x is not None and _weight(match) is torch.float16 else None


def computed_parameters(match: Match) -> str | None:
    for name in ("w", "b"):
        if match.captures.get(name) is not None and not match.is_constant(name):
            return limits.computed(str(match.captures[name]))
    return None


def unbatched(match: Match) -> str | None:
    x, w = match.value("x"), match.value("w")
    return None if x is None or w is None else limits.unbatched(x.dim(), w.dim())


def uneven_same_padding(match: Match) -> str | None:
    w = match.value("w")
    if w is None:
        return None
    return limits.uneven_padding(match.argument(conv, "padding"), w.shape[2:], _steps(match, w.dim() - 2))


def padding_only(match: Match) -> str | None:
    x, w = match.value("x"), match.value("w")
    if x is None or w is None:
        return None
    steps = {name: match.argument(conv, name) for name in ("stride", "padding", "dilation")}
    return limits.padding_only(x.shape[2:], w.shape[2:], **steps)


def clamps_otherwise(match: Match) -> str | None:
    low, high = match.argument(after_conv, "min_val"), match.argument(after_conv, "max_val")
    return None if low is None else limits.bounds(low, high)


def not_in_place_sum(match: Match) -> str | None:
    """oneDNN adds into the memory of the other operand; Inductor checks that when it compiles."""
    other, x = match.captures["other"], match.captures["x"]
    if other is x:
        return because("sum_in_float", "it adds its own input; the kernel would overwrite what it still reads")
    if isinstance(other, Node) and other.target in (*reshaping.targets, *copying.targets):
        return because("sum_in_float", "it adds a view of another tensor; the kernel needs memory of its own")
    return not_fused_sum(match)


def not_fused_sum(match: Match) -> str | None:
    product = next(node for declared, node in match.calls if declared in (conv, linear))
    if match.is_constant("other"):
        return because("sum_in_float", "it adds a constant")
    same = match.captures["other"] is product
    return limits.summed(match.argument(plus, "alpha"), product.meta.get("val"), match.value("other"), same)


def unusual_pool(match: Match) -> str | None:
    x = match.value("x")
    return None if x is None else limits.pooled(x.shape, match.argument(maximum_of, "ceil_mode"))


def converts(match: Match) -> str | None:
    dtype = match.argument(average, "dtype")
    return because("conversion", f"dtype={dtype}: it converts; leave it out") if dtype is not None else None


def not_zero_padding(match: Match) -> str | None:
    return limits.not_zero_padding(match.root)


def _steps(match: Match, dimensions: int) -> list[int]:
    dilation = match.argument(conv, "dilation")
    given = list(dilation) if isinstance(dilation, (list, tuple)) else [dilation]
    return given * dimensions if len(given) == 1 else given


_CONV = (computed_parameters, unbatched, uneven_same_padding, padding_only)
_LINEAR = (computed_parameters, half_weights_in_half_models, unbatched)


# Rules: the first that fits a node takes it ---------------------------------------------------------------------------


@rule(x=INPUT, w=WEIGHT, other=INPUT, output=OUTPUT, unless=[*_CONV, not_in_place_sum])
def conv_add_relu(x, w, b, other):
    """The sum goes into the memory of the other operand, which has a scale of its own."""
    return rectify(plus(conv(x, w, b), other))


@rule(x=INPUT, w=WEIGHT, other=INPUT, output=OUTPUT, unless=[*_CONV, not_in_place_sum])
def conv_add(x, w, b, other):
    return plus(conv(x, w, b), other)


@rule(x=INPUT, w=WEIGHT, output=OUTPUT, unless=[*_CONV, clamps_otherwise])
def conv_unary(x, w, b):
    """relu, relu6 and hardtanh with any bounds, hardswish, silu."""
    return after_conv(conv(x, w, b))


@rule(x=INPUT, w=WEIGHT, output=OUTPUT, unless=_CONV)
def conv_only(x, w, b):
    return conv(x, w, b)


@rule(x=INPUT, w=WEIGHT, unless=[*_LINEAR, not_fused_sum])
def linear_add_relu(x, w, b, other):
    """The other operand stays float, as does the sum: residual streams keep their precision."""
    return rectify(plus(linear(x, w, b), other))


@rule(x=INPUT, w=WEIGHT, unless=[*_LINEAR, not_fused_sum])
def linear_add(x, w, b, other):
    return plus(linear(x, w, b), other)


@rule(x=INPUT, w=WEIGHT, output=OUTPUT, unless=_LINEAR)
def linear_unary(x, w, b):
    """relu, gelu with erf or tanh."""
    return after_linear(linear(x, w, b))


@rule(x=INPUT, w=WEIGHT, output=OUTPUT, unless=_LINEAR)
def linear_only(x, w, b):
    """mm, matmul and addmm with a constant second operand arrive here too, see `matmul_to_linear`."""
    return linear(x, w, b)


@rule(a=INPUT, b=INPUT, unless=[not_asked_for, not_static])
def matmul(a, b):
    """The operands travel as integers, the product is computed in float: Inductor has no integer kernel for it."""
    return product(a, b)


@rule(w=WEIGHT, unless=[not_weight_only, computed_table, uneven_rows])
def embedding(w, index):
    return lookup(w, index)


@rule(w=WEIGHT, unless=[not_weight_only, computed_table, uneven_rows, no_kernel_for_bags])
def embedding_bag(w, index, offsets):
    return lookup_bags(w, index, offsets)


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


CONVOLUTIONS = (conv_add_relu, conv_add, conv_unary, conv_only)
LINEARS = (linear_add_relu, linear_add, linear_unary, linear_only)

NO_TABLES = "this quantizer has no recipe for tables of integers"
_FUSED = "Inductor computes it in float, in one loop with its neighbours"
REASONS = MappingProxyType(
    dict.fromkeys(ops.CONV_TRANSPOSE, limits.NO_TRANSPOSED)
    | dict.fromkeys(ops.CONV3D, "Inductor has integer convolutions in 1-d and 2-d only")
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
