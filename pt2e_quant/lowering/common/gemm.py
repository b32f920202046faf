"""Convolutions and matrix products with dequantized weights, as every backend sees them."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ...ops import CHOOSE_QPARAMS, MM, PRODUCTS, factors, is_call, is_dequantize, is_quantize

__all__ = ["Gemm", "Q", "as_gemm", "gemms", "is_dynamic", "output_quantize"]

Q = torch.ops.quantized_decomposed
_GEMMS = PRODUCTS.union(MM)
_CHOOSE = frozenset(CHOOSE_QPARAMS)


@dataclass(frozen=True)
class Gemm:
    """A convolution or matrix product whose weight is dequantized.

    Args:
        node: the operator.
        activation, bias: its operands.
        weight: the dequantize of its weight.
        dynamic: the activation's qparams are computed while the program runs.
    """

    node: Node
    activation: Node
    weight: Node
    bias: Node | None
    dynamic: bool

    @property
    def is_integer(self) -> bool:
        """Both of its factors are dequantized."""
        return is_dequantize(self.activation)


def gemms(gm: GraphModule) -> list[Gemm]:
    """All of a graph, in its order, as they are before a pass edits it."""
    return [gemm for gemm in map(as_gemm, gm.graph.nodes) if gemm is not None]


def as_gemm(node: Node) -> Gemm | None:
    """The operator with its operands, when it is a convolution or matrix product with a dequantized weight."""
    if not is_call(node) or node.target not in _GEMMS:
        return None
    activation, weight, bias = factors(node)
    if not isinstance(activation, Node) or not is_dequantize(weight):
        return None
    return Gemm(node, activation, weight, bias, is_dynamic(activation))


def is_dynamic(activation: Node) -> bool:
    """Whether a tensor is dequantized with qparams that are computed while the program runs."""
    scale = activation.args[1] if is_dequantize(activation) else None
    if not isinstance(scale, Node) or not is_call(scale) or not scale.all_input_nodes:
        return False
    return scale.all_input_nodes[0].target in _CHOOSE


def output_quantize(node: Node, fused: Container[Any]) -> Node | None:
    """The quantize that is the only user of the node, or of the fused activation that is its only user."""
    for _ in range(2):
        if len(node.users) != 1:
            return None
        (user,) = node.users
        if is_quantize(user):
            return user
        if user.target not in fused:
            return None
        node = user
    return None
