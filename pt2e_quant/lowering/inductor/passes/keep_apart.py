"""Keep what Inductor would fuse wrongly, or fail to, apart from an integer kernel.

Its patterns fuse sums, activation functions and quantizes with a product whatever was annotated, and look at few of
their arguments. A double negation, free in the loop that computes the rest, fits none of them and changes no value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ....arguments import bind
from ....graph.module import tidy
from ....graph.write import Writer, call
from ....ops import ADD, CLAMP, HARDTANH, is_conv, is_elementwise, is_quantize
from ...common.gemm import as_gemm
from ..limits import bounds, not_8_bits, summed

__all__ = ["keep_apart"]

aten = torch.ops.aten
_DIVIDE = frozenset((aten.div.Tensor_mode, aten.div.Scalar_mode))
_REACH = 10
"""Elementwise operators in the longest activation function that Inductor recognizes: gelu with tanh has as many."""


def keep_apart(gm: GraphModule) -> GraphModule:
    """Negate twice between a product, or what follows it, and a reader that may not become one kernel with it."""
    write = Writer(gm, "keep_apart")
    distance = _distances(gm)
    for node, steps in list(distance.items()):
        for user in list(node.users):
            if _must_stay_apart(node, user, steps):
                with write.before(user, like=node):
                    held = call(aten.neg.default, call(aten.neg.default, write(node)))
                user.replace_input_with(node, held.node)
    return tidy(gm)


def _distances(gm: GraphModule) -> dict[Node, int]:
    """How many elementwise operators lie between a node and the integer product before it."""
    found: dict[Node, int] = {}
    for node in gm.graph.nodes:
        gemm = as_gemm(node)
        if gemm is not None and gemm.is_integer:
            found[node] = 0
        elif is_elementwise(node):
            near = [found[source] for source in node.all_input_nodes if source in found]
            if near and min(near) < _REACH:
                found[node] = min(near) + 1
    return found


def _must_stay_apart(node: Node, user: Node, steps: int) -> bool:
    if user.target in ADD:
        return _cannot_be_summed(node, user) if steps == 0 else node.target not in ADD
    if is_quantize(user):
        return not_8_bits(bind(user).get("dtype", torch.uint8)) is not None
    if user.target in (*CLAMP, *HARDTANH) or "clamp" in str(user.target):
        return steps == 0 and is_conv(node) and _cannot_clamp(user)
    return user.target in _DIVIDE and user.args[0] is node


def _cannot_be_summed(node: Node, add: Node) -> bool:
    first, second = add.args[:2]
    other: Any = second if first is node else first
    values = [one.meta.get("val") if isinstance(one, Node) else None for one in (node, other)]
    if isinstance(other, Node) and not isinstance(values[1], Tensor):
        return False
    return summed(1, values[0], values[1], first is second) is not None


def _cannot_clamp(user: Node) -> bool:
    bound = bind(user)
    low, high = bound.get("min_val", bound.get("min")), bound.get("max_val", bound.get("max"))
    return (low is not None or high is not None) and bounds(low, high) is not None
