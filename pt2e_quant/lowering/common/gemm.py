"""Convolutions and matrix products with dequantized weights, as every backend sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ...arguments import bind
from ...graph.values import rank
from ...ops import (
    CHOOSE_QPARAMS,
    CONV,
    CONV_TRANSPOSE,
    CONVOLUTION,
    HARDTANH,
    LINEAR,
    RELU,
    RELU6,
    is_call,
    is_conv_transpose,
    is_dequantize,
    is_quantize,
    op_name,
)

__all__ = ["Gemm", "as_gemm"]

Q = torch.ops.quantized_decomposed


_FUSED = frozenset((*RELU, *RELU6, *HARDTANH))


_GEMM_OPERANDS: dict[Any, tuple[str, str, str]] = {
    **dict.fromkeys((*CONV, *CONV_TRANSPOSE, *CONVOLUTION, *LINEAR), ("input", "weight", "bias")),
    torch.ops.aten.mm.default: ("self", "mat2", ""),
    torch.ops.aten.matmul.default: ("self", "other", ""),
    torch.ops.aten.addmm.default: ("mat1", "mat2", "self"),
}


_CHOOSE = frozenset(CHOOSE_QPARAMS)


@dataclass(frozen=True)
class Gemm:
    """A convolution or matrix product whose weight is dequantized.

    Args:
        node: the operator.
        activation, bias: its operands; before a convolution, zeros padded to the activation are part of it.
        weight: the dequantize of its weight.
        quantize: the quantize of its output, after an optional relu or hardtanh that fuses; None without one.
        dynamic: the activation's qparams are computed while the program runs.
    """

    node: Node
    activation: Node
    weight: Node
    bias: Node | None
    quantize: Node | None
    dynamic: bool


def as_gemm(node: Node) -> Gemm | None:
    """The operator with its surroundings, when it is a convolution or matrix product with a dequantized weight."""
    names = _GEMM_OPERANDS.get(node.target) if is_call(node) else None
    if names is None:
        return None
    bound = bind(node)
    activation, weight, bias = bound[names[0]], bound[names[1]], bound.get(names[2])
    if not isinstance(activation, Node) or not is_dequantize(weight):
        return None
    if node.target in (*CONV, *CONVOLUTION) and _is_padding(activation) and not is_conv_transpose(node):
        activation = activation.all_input_nodes[0]  # the convolution's kernel pads, too
    dynamic = is_dequantize(activation) and _is_chosen_while_running(activation)
    return Gemm(node, activation, weight, bias, _output_quantize(node, _FUSED), dynamic)


def _is_padding(node: Node) -> bool:
    """A pad with zeros around the image that only one node reads."""
    if not is_call(node) or op_name(node) not in ("pad", "constant_pad_nd") or len(node.users) != 1:
        return False
    bound, dimensions = bind(node), rank(node)
    amounts = list(bound["pad"])
    zeros = bound.get("mode", "constant") == "constant" and not bound["value"]
    inside = dimensions is not None and not any(amounts[2 * (dimensions - 2) :])
    return zeros and inside and all(isinstance(amount, int) and amount >= 0 for amount in amounts)


def _is_chosen_while_running(dequantize: Node) -> bool:
    scale = dequantize.args[1]
    if not isinstance(scale, Node) or not is_call(scale) or not scale.all_input_nodes:
        return False
    return scale.all_input_nodes[0].target in _CHOOSE


def _output_quantize(node: Node, fused: frozenset[Any]) -> Node | None:
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
