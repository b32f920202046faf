"""Put quantize and dequantize, on the grid of the input, after zeros padded to a dequantized tensor.

Zero and the tensor's own values lie on that grid, so no value changes. XNNPACK marks every such pad as one on integers;
when no integer kernel follows, its delegate would fail to load.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from ....graph.module import tidy
from ....graph.write import Writer
from ....grid import Grid
from ....ops import PAD, is_quantize
from ..xnnpack.case import Case
from ..xnnpack.limits import not_zero_padding
from ..xnnpack.patterns import as_product, why_portable
from .steps import on_grid

__all__ = ["quantize_padding"]


def quantize_padding(gm: GraphModule) -> GraphModule:
    """Each reader gets a dequantize of its own."""
    write = Writer(gm, "quantize_padding")
    for node in list(filter(_pads_with_zeros, gm.graph.nodes)):
        dequantize, users = node.all_input_nodes[0], list(node.users)
        if Grid.of(dequantize) is None or any(map(is_quantize, users)) or _belongs_to_a_kernel(users):
            continue
        with write.after(node):
            values = [on_grid(write(node), dequantize) for _ in users]
        for user, value in zip(users, values, strict=True):
            user.replace_input_with(node, value.node)
    return tidy(gm)


def _pads_with_zeros(node: Node) -> bool:
    return node.target in PAD and not_zero_padding(Case(node)) is None


def _belongs_to_a_kernel(users: list[Node]) -> bool:
    product = as_product(users[0]) if len(users) == 1 else None
    return product is not None and not any(why_portable(product))
