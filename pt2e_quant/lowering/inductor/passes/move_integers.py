"""Let ops that only move values move the integers: quantize(move(dequantize(q, p)), p) is move(q).

Inductor would compute the real numbers and round them again, for every element. Padded zeros become zero points.
"""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule, Node

from ....arguments import set_argument
from ....graph.module import tidy
from ....grid import Grid
from ....ops import CAT, PAD, is_call, is_quantize, pads_zeros
from ..limits import moves

__all__ = ["move_integers"]


def move_integers(gm: GraphModule) -> GraphModule:
    """Take away a quantize and the dequantizes that the move reads, where all have one grid."""
    for quantize in list(filter(is_quantize, gm.graph.nodes)):
        grid, move = Grid.of(quantize), quantize.args[0]
        if grid is None or not is_call(move) or len(move.users) != 1 or not _moves(move):
            continue
        # A reshape of dynamic shapes also reads sizes.
        sources = [node for node in move.all_input_nodes if isinstance(node.meta.get("val"), Tensor)]
        if not sources or any(Grid.of(source) != grid or is_quantize(source) for source in sources):
            continue
        for source in sources:
            move.replace_input_with(source, source.args[0])
        if move.target in PAD:
            set_argument(move, "value", grid.zero_point)
        move.meta["val"] = quantize.meta.get("val")
        quantize.replace_all_uses_with(move)
        gm.graph.erase_node(quantize)
    return tidy(gm)


def _moves(node: Node) -> bool:
    return pads_zeros(node) or node.target in CAT or moves(node)
