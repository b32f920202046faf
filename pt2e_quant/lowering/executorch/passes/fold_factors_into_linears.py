"""Multiply the weight's scale and the bias of a linear instead of its output, or of a product that it enters.

c * (q @ k) with q = linear(x), as in attention, is (c * q) @ k; in between, values may be moved but not read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ....arguments import bind
from ....graph.attributes import constant
from ....graph.module import tidy
from ....graph.write import Writer
from ....ops import DIV, LINEAR, MUL, is_call, is_dequantize, is_value_preserving
from ...common.gemm import Q
from .looks import is_float32

__all__ = ["fold_factors_into_linears"]

aten = torch.ops.aten
_PER_CHANNEL = (Q.dequantize_per_channel.default, Q.dequantize_per_channel_group.default)


def fold_factors_into_linears(gm: GraphModule) -> GraphModule:
    """Only positive factors: scales of integers are."""
    write = Writer(gm, "fold_factors_into_linears", "_scaled_")
    for node in list(gm.graph.nodes):
        factor = _factor(node)
        linear = None if factor is None else _linear_before(node.all_input_nodes[0])
        if linear is not None and _scale(write, linear, factor):  # type: ignore[arg-type]
            write.replace(node, node.all_input_nodes[0])
    return tidy(gm)


def _factor(node: Node) -> float | None:
    """c of x * c with a number or a constant of one element."""
    if not is_call(node) or node.target not in (*MUL, aten.mul.Scalar, *DIV) or not is_float32(node):
        return None
    x, other = node.args[:2]
    number: Any = other
    if isinstance(other, Node):
        value = constant(other)
        number = float(value) if value is not None and value.dim() == 0 else None
    if not isinstance(x, Node) or not isinstance(number, (int, float)) or not number > 0:
        return None
    return 1 / number if node.target in DIV else float(number)


def _linear_before(value: Node) -> Node | None:
    """The linear whose output this is, moved or multiplied from the right on the way and read by nobody else."""
    while is_call(value) and len(value.users) == 1:
        if value.target in LINEAR:
            return value
        product = value.target in (aten.matmul.default, aten.bmm.default)
        if not product and not is_value_preserving(value):
            return None
        value = value.all_input_nodes[0]
    return None


def _scale(write: Writer, linear: Node, factor: float) -> bool:
    """Scale the parameters of a linear; False when they are not stored ones of its own."""
    bound = bind(linear)
    weight, bias = bound["weight"], bound["bias"]
    reader, stored = linear, weight
    if is_dequantize(weight):
        if weight.target not in _PER_CHANNEL:
            return False
        reader, stored = weight, weight.args[1]
    readers = {stored: reader} if bias is None else {stored: reader, bias: linear}
    if any(constant(parameter) is None for parameter in readers) or len(weight.users) > 1:
        return False
    for parameter, user in readers.items():
        scaled = constant(parameter).detach() * factor  # type: ignore[union-attr]
        with write.before(reader, like=parameter):
            new = write.constant(scaled if is_dequantize(user) else nn.Parameter(scaled, requires_grad=False))
        user.replace_input_with(parameter, new.node)
    return True
