"""Write (x * w).sum(1), with one weight for each row as in the mean over unmasked tokens, as a bmm of both."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from ....arguments import bind
from ....graph.module import tidy
from ....graph.write import Writer, function
from ....ops import MUL
from .looks import is_float32, names_of_sizes

__all__ = ["weighted_sums_to_products"]

aten = torch.ops.aten
bmm, transpose = function(aten.bmm.default), function(aten.transpose.int)


def weighted_sums_to_products(gm: GraphModule) -> GraphModule:
    """Of products with three dimensions."""
    write = Writer(gm, "weighted_sums_to_products")
    for node in gm.graph.find_nodes(op="call_function", target=aten.sum.dim_IntList):
        factors = _factors(node)
        if factors is not None:
            row, other = map(write, factors)
            with write.before(node):
                value = bmm(transpose(row, 1, 2), other)
                write.replace(node, value if bind(node)["keepdim"] else value.squeeze(1))
    return tidy(gm)


def _factors(node: Node) -> tuple[Node, Node] | None:
    """(the weight of each row, what is weighted) of a sum over rows."""
    bound = bind(node)
    product = bound["self"]
    if bound["dtype"] is not None or product.target not in MUL or not is_float32(product):
        return None
    if product.meta["val"].dim() != 3 or [dim % 3 for dim in bound["dim"] or ()] != [1]:
        return None
    rows = [factor for factor in product.all_input_nodes if _is_row_weight(factor, product)]
    others = [factor for factor in product.all_input_nodes if factor not in rows]
    if len(rows) != 1 or len(others) != 1 or names_of_sizes(others[0]) != names_of_sizes(product):
        return None
    return _before_expand(rows[0]), others[0]


def _is_row_weight(factor: Node, product: Node) -> bool:
    return is_float32(factor) and names_of_sizes(_before_expand(factor)) == [*names_of_sizes(product)[:2], "1"]


def _before_expand(factor: Node) -> Node:
    return factor.all_input_nodes[0] if factor.target is aten.expand.default else factor
