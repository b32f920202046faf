"""Write every reshape as view or reshape to literal sizes, with -1 for the one that depends on the inputs.

XNNPACK takes neither squeeze, nor unsqueeze before the last dimension, nor sizes computed while running.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from ....graph.module import tidy
from ....graph.write import Symbol, Writer, function
from ....ops import RESHAPE, SQUEEZE
from .looks import literal_sizes
from .steps import Emit, replace_by_steps

__all__ = ["reshapes_to_views"]

aten = torch.ops.aten
contiguous = function(aten.contiguous.default)

_RESHAPES = frozenset((*RESHAPE, *SQUEEZE))
_VIEWS = frozenset((*SQUEEZE, aten.view.default))


def reshapes_to_views(gm: GraphModule) -> GraphModule:
    """Only where at most one size is dynamic."""
    write = Writer(gm, "reshapes_to_views")
    for node in [node for node in gm.graph.nodes if node.target in _RESHAPES and "val" in node.meta]:
        sizes = literal_sizes(node)
        if sizes.count(-1) <= 1 and 0 not in sizes:
            replace_by_steps(write, node, _reshaped(node, sizes))
    return tidy(gm)


def _reshaped(node: Node, sizes: list[int]) -> list[Emit]:
    """A view, after a copy where it needs one: for a reshape, export writes computed sizes instead of -1."""

    def view(x: Symbol) -> Symbol:
        return x.view(sizes)  # type: ignore[no-any-return]

    if node.target in _VIEWS:
        return [view]
    return [contiguous, view] if -1 in sizes else [lambda x: x.reshape(sizes)]
