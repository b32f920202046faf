"""Quantize a product with a matrix before the relu or hardtanh after it, on the grid of the quantize after that.

XNNPACK tries to fuse the two and fails when the program is loaded; of linears and convolutions it fuses them. Clamping
a number and rounding it to a grid commute, up to a bound that lies off the grid, which is rounded in either case.
"""

from __future__ import annotations

from functools import partial

from torch.fx import GraphModule

from ....graph.module import tidy
from ....graph.write import Writer
from ....ops import MM
from ..xnnpack.patterns import as_product
from .steps import on_grid

__all__ = ["clamps_after_products"]


def clamps_after_products(gm: GraphModule) -> GraphModule:
    """The clamp then runs on integers, as a kernel of its own."""
    products = [as_product(node) for node in gm.graph.nodes if node.target in MM]
    write = Writer(gm, "clamps_after_products")
    for product in products:
        if product is None or product.dynamic or product.quantize is None or product.quantize in product.node.users:
            continue
        on_its_grid = partial(on_grid, near=product.quantize, like=product.activation)
        write.follow(product.node, on_its_grid)
    return tidy(gm)
