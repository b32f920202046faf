"""Specs, quantizers and hand arithmetic that the tests of the engine share. Bounds and eps are nobody's default."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from pt2e_quant.observer import MinMaxObserver, PerChannelMinMaxObserver, PlaceholderObserver
from pt2e_quant.quantizer import (
    INHERIT,
    INPUT,
    OUTPUT,
    WEIGHT,
    QuantizationAnnotation,
    QuantizationConfig,
    QuantizationSpec,
    Quantizer,
    RuleQuantizer,
    one_scale,
    op,
    rule,
    same_as,
)

__all__ = [
    "ACT",
    "DYNAMIC",
    "PER_CHANNEL",
    "STATIC",
    "WEIGHT_ONLY",
    "ByHand",
    "Nothing",
    "Toy",
    "affine_by_hand",
    "annotate",
    "calls",
    "dequantizes",
    "on_grid",
    "quantizes",
    "relative_error",
    "symmetric_by_hand",
    "the_call",
]

aten = torch.ops.aten
decomposed = torch.ops.quantized_decomposed

EPS = 2**-14
ACT = QuantizationSpec(torch.int8, MinMaxObserver.with_args(eps=EPS), -120, 115, torch.per_tensor_affine)
PER_CHANNEL = QuantizationSpec(
    torch.int8, PerChannelMinMaxObserver.with_args(eps=EPS), -119, 119, torch.per_channel_symmetric, ch_axis=0
)
RUN_TIME = QuantizationSpec(
    torch.int8, PlaceholderObserver.with_args(eps=EPS), -128, 127, torch.per_tensor_affine, is_dynamic=True
)
STATIC = QuantizationConfig(ACT, ACT, PER_CHANNEL)
DYNAMIC = QuantizationConfig(RUN_TIME, None, PER_CHANNEL)
WEIGHT_ONLY = QuantizationConfig(None, None, PER_CHANNEL)

conv = op(aten.conv1d.default, aten.conv2d.default, aten.conv2d.padding)
linear = op(aten.linear.default)
relu = op(aten.relu.default)
plus = op(aten.add.Tensor)
concatenate = op(aten.cat.default)
moving = op(aten.view.default, aten.reshape.default, aten.permute.default, aten.max_pool2d.default)


@rule(x=INPUT, w=WEIGHT, output=OUTPUT)
def conv_relu(x, w, b):
    return relu(conv(x, w, b))


@rule(x=INPUT, w=WEIGHT, output=OUTPUT)
def conv_only(x, w, b):
    return conv(x, w, b)


@rule(x=INPUT, w=WEIGHT, output=OUTPUT)
def linear_relu(x, w, b):
    return relu(linear(x, w, b))


@rule(x=INPUT, w=WEIGHT, output=OUTPUT)
def linear_only(x, w, b):
    return linear(x, w, b)


@rule(a=INPUT, b=INPUT, output=OUTPUT)
def add(a, b):
    return plus(a, b)


@rule(tensors=one_scale(INPUT), output=same_as("tensors"))
def cat(*tensors):
    return concatenate(tensors)


@rule(x=INHERIT, output=same_as("x"))
def move(x):
    return moving(x)


class Toy(RuleQuantizer):
    """A backend of a few rules, none of which refuses anything."""

    rules = (conv_relu, conv_only, linear_relu, linear_only, add, cat, move)


class ByHand(Quantizer):
    """A quantizer that is one function of the graph."""

    def __init__(self, function: Callable[[GraphModule], None]) -> None:
        self.function = function

    def annotate(self, model: GraphModule) -> GraphModule:
        self.function(model)
        return model

    def validate(self, model: GraphModule) -> None:
        pass


class Nothing(ByHand):
    """A quantizer that annotates nothing; with allow_empty=True it shows what capture alone does."""

    def __init__(self) -> None:
        super().__init__(lambda model: None)


def annotate(
    node: Node, inputs: dict[Node, Any] | None = None, output: Any = None, *, allow_implicit_sharing: bool = True
) -> None:
    """Write an annotation as a quantizer of the reference API would."""
    node.meta["quantization_annotation"] = QuantizationAnnotation(
        dict(inputs or {}), output, allow_implicit_sharing=allow_implicit_sharing, _annotated=True
    )


def calls(gm: GraphModule, *targets: Any) -> list[Node]:
    """The call_function nodes of these targets, in graph order."""
    return [node for node in gm.graph.nodes if node.op == "call_function" and node.target in targets]


def the_call(gm: GraphModule, target: Any) -> Node:
    """The one call of a target."""
    (node,) = calls(gm, target)
    return node


def quantizes(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if str(node.target).startswith("quantized_decomposed.quantize_")]


def dequantizes(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if str(node.target).startswith("quantized_decomposed.dequantize_")]


def affine_by_hand(values: Iterable[Tensor], low: int = -120, high: int = 115) -> tuple[float, int]:
    """(scale, zero point) that map the range of `values`, zero included, onto [low, high]."""
    bottom = min(0.0, *(value.min().item() for value in values))
    top = max(0.0, *(value.max().item() for value in values))
    scale = (top - bottom) / (high - low)
    return scale, low - round(bottom / scale)


def symmetric_by_hand(weight: Tensor, axis: int = 0, half: float = 119.0) -> Tensor:
    """One scale per index of `axis`, with -half..half for the largest magnitude."""
    return weight.abs().amax([d for d in range(weight.dim()) if d != axis], keepdim=True) / half


def on_grid(x: Tensor, scale: float | Tensor, zero_point: int = 0, low: int = -120, high: int = 115) -> Tensor:
    """x rounded to what (q - zero_point) * scale can be for an integer q in [low, high]."""
    q = torch.clamp(torch.round(x / scale) + zero_point, low, high)
    return (q - zero_point) * scale


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, in units of the largest expected value."""
    difference = (actual.detach() - expected.detach()).abs().max()
    return float(difference / expected.detach().abs().max())
