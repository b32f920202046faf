"""Handles: numbers by which the numeric debugger knows one value in every version of a model.

A handle is a mark (`meta.mark`), which copies, exports, decompositions and files pass on.
"""

from __future__ import annotations

from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from ..meta import HANDLE_KEY, mark, marks
from .nested import every_node

__all__ = ["give_handles", "handle_of"]


def handle_of(node: Node) -> int | None:
    """The handle of a node, or of the node that it stems from; None without one."""
    handle = marks(node).get(HANDLE_KEY)
    return handle if isinstance(handle, int) else None


def give_handles(model: ExportedProgram | GraphModule) -> None:
    """Give every op that has no handle yet a new one, those of nested graphs included."""
    gm = model.graph_module if isinstance(model, ExportedProgram) else model
    nodes = every_node(gm)
    free = max((handle for node in nodes if (handle := handle_of(node)) is not None), default=0) + 1
    for node in nodes:
        if node.op == "call_function" and handle_of(node) is None:
            mark(node, HANDLE_KEY, free)
            free += 1
