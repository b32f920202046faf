"""Keep transposes outside where all around them is reshapes that XNNPACK cannot take: to two dynamic sizes."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from ....graph.module import tidy
from ....graph.write import Writer, function
from ....meta import PORTABLE, mark
from ....ops import EXPAND, PERMUTE, RESHAPE, SQUEEZE, is_call
from .looks import literal_sizes

__all__ = ["moves_stay_with_their_reshapes"]

aten = torch.ops.aten
contiguous = function(aten.contiguous.default)

_COPYING = (aten.reshape.default, aten.flatten.using_ints)
_MOVES = frozenset((*PERMUTE, aten.contiguous.default, aten.clone.default))
_RESHAPES = frozenset((*RESHAPE, *SQUEEZE, *EXPAND))
_BETWEEN = "moves values between two reshapes outside, where a delegate of its own would cost more than it saves"


def moves_stay_with_their_reshapes(gm: GraphModule) -> GraphModule:
    """Mark the moves that no delegate may take."""
    _copy_before_reshapes(gm)
    kept = {node for node in gm.graph.nodes if node.target in _MOVES}
    while True:
        inside = {
            node for node in kept for near in (*node.all_input_nodes, *node.users)
            if near not in kept and not _is_free_reshape(near)
        }  # fmt: skip
        if not inside:
            break
        kept -= inside
    for node in kept:
        mark(node, PORTABLE, _BETWEEN)
    return tidy(gm)


def _copy_before_reshapes(gm: GraphModule) -> None:
    """What export would do, out of our reach."""
    write = Writer(gm, "moves_stay_with_their_reshapes")
    for node in list(filter(_is_free_reshape, gm.graph.nodes)):
        source = node.all_input_nodes[0]
        if node.target in _COPYING and not source.meta["val"].is_contiguous():
            with write.before(node):
                node.replace_input_with(source, contiguous(write(source)).node)


def _is_free_reshape(node: Node) -> bool:
    return is_call(node) and node.target in _RESHAPES and literal_sizes(node).count(-1) > 1
