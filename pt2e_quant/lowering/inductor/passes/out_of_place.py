"""Compute elementwise ops out of place, where nobody sees the memory that they write to.

Inductor does the same later, and then drops what it was told of their nodes, so the account would lose their kernels.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from ....arguments import is_in_place
from ....graph.module import tidy
from ....ops import functional, is_call, memory_of

__all__ = ["out_of_place"]


def out_of_place(gm: GraphModule) -> GraphModule:
    """Every reader already reads the result and not what was written to: `follow_in_place` saw to that."""
    changed = False
    for node in gm.graph.nodes:
        if is_call(node) and is_in_place(node.target) and functional(node.target) is not node.target:
            written = node.args[0]
            if isinstance(written, Node) and _is_private(written, node):
                node.target = functional(node.target)
                changed = True
    return tidy(gm) if changed else gm


def _is_private(written: Node, by: Node) -> bool:
    """A computed tensor in memory of its own, which no one else reads."""
    return is_call(written) and memory_of(written) is None and list(written.users) == [by]
