"""Quantize values that are only moved on the grid that they come from, before they change to another grid.

XNNPACK moves integers within one grid. Where input and output have grids of their own, as a foreign quantizer may ask,
the values are moved on the first (a cat's: on the last) and requantized beside it, as the graph says.
"""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from ....graph.module import tidy
from ....graph.write import Writer
from ....grid import Grid
from ....ops import is_call
from ..xnnpack.limits import CAT, kernel_of
from ..xnnpack.patterns import as_integer_op
from .steps import on_grid

__all__ = ["moves_on_their_grid"]


def moves_on_their_grid(gm: GraphModule) -> GraphModule:
    """Values stay: rounding to a grid that they lie on changes nothing."""
    write = Writer(gm, "moves_on_their_grid")
    for node in list(filter(_moves, gm.graph.nodes)):
        kernel = as_integer_op(node)
        after = None if kernel is None else Grid.of(kernel.quantize)
        if kernel is None or after is None or any(Grid.of(source) is None for source in kernel.inputs):
            continue
        strangers = [source for source in kernel.inputs if Grid.of(source) != after]
        if node.target in CAT.ops:
            for source in strangers:
                with write.before(node):
                    node.replace_input_with(source, on_grid(write(source), kernel.quantize, like=source).node)
        elif strangers:
            with write.after(node):
                moved: Any = on_grid(write(node), kernel.inputs[0])
            node.replace_all_uses_with(moved.node, delete_user_cb=lambda user: user is kernel.quantize)  # noqa: B023
    return tidy(gm)


def _moves(node: Node) -> bool:
    kernel = kernel_of(node) if is_call(node) else None
    return kernel is not None and kernel.moves
