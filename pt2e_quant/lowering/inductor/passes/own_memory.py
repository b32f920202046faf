"""Stop Inductor from adding into memory that others read: in its own graph, before code is generated.

Its fused kernels add in the memory of the other operand. Inductor 2.13 asks whether that has other readers, and not
whose it is, nor whether a view of it is read later: `relu(x + linear(x))` leaves the sum in the caller's x.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from ....ops import memory_of
from ..limits import moves

__all__ = ["own_memory"]

_OPERANDS = {"qlinear_binary": "x_2", "qconv_binary": "accum"}


def own_memory(graph: Graph) -> None:
    """Let a linear write the sum into memory of its own, and give a convolution a copy to add to."""
    for node in list(graph.nodes):
        name = getattr(node.target, "__name__", "")
        operand = node.kwargs.get(_OPERANDS.get(name, ""))
        if not isinstance(operand, Node) or not _is_shared(operand):
            continue
        if name == "qlinear_binary":
            node.update_kwarg("binary_op_name", "add")
        else:
            with graph.inserting_before(node):
                own = graph.call_function(torch.ops.aten.clone.default, (operand,))
            own.meta.update(operand.meta)
            node.update_kwarg("accum", own)


def _is_shared(node: Node) -> bool:
    """It belongs to the caller, it is a view, or there are views of it."""
    return node.op in ("placeholder", "get_attr") or _is_view(node) or any(map(_is_view, node.users))


def _is_view(node: Node) -> bool:
    return node.op == "call_function" and (moves(node) or memory_of(node) is not None)
