"""Quantize a product with a matrix before the relu or hardtanh after it, on the grid of the quantize after that.

XNNPACK tries to fuse the two and fails when the program is loaded; of linears and convolutions it fuses them. Clamping
a number and rounding it to a grid commute, up to a bound that lies off the grid, which is rounded in either case.
"""

from __future__ import annotations

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
        if product is not None and not product.dynamic and product.quantize not in (None, *product.node.users):
            write.follow(product.node, lambda value: on_grid(value, product.quantize, like=product.activation))  # noqa: B023
    return tidy(gm)
