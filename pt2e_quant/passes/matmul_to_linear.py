"""A product with a constant matrix becomes a linear.

Backends have one integer linear and many half-supported products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ..arguments import bind
from ..checks import checked
from ..errors import CaptureError
from ..graph.attributes import free_name, insert_attribute
from ..graph.constants import Constants
from ..graph.module import tidy
from ..graph.values import is_float_tensor
from ..graph.write import Writer, function
from ..ops import MM, functional

__all__ = ["matmul_to_linear"]

aten = torch.ops.aten
linear = function(aten.linear.default)


@checked(CaptureError)
def matmul_to_linear(gm: GraphModule) -> GraphModule:
    """Turn mm, matmul and addmm by a constant 2-d matrix into linear, whose weight is stored (out, in).

    addmm with beta or alpha not 1 stays.
    """
    forms = frozenset(map(functional, MM))
    found = [node for node in gm.graph.nodes if node.target in forms and is_float_tensor(node)]
    if not found:
        return gm
    write, constants = Writer(gm, "matmul_to_linear"), Constants(gm)
    names = free_name(gm, "_linear_weight_")
    weights: dict[Node, Node] = {}
    for node in found:
        x, matrix, bias = _factors(node)
        if matrix not in constants or matrix.meta["val"].dim() != 2:
            continue
        with write.before(node):
            if matrix not in weights:
                weight = nn.Parameter(constants.value(matrix).t().contiguous(), requires_grad=False)
                weights[matrix] = insert_attribute(gm, next(names), weight, like=node, by="matmul_to_linear")
                constants.note(weights[matrix])
            arguments = (weights[matrix],) if bias is None else (weights[matrix], bias)
            write.replace(node, linear(write(x), *arguments))
    return tidy(gm) if weights else gm


def _factors(node: Node) -> tuple[Any, Any, Any]:
    """(x, matrix, bias) of x @ matrix + bias; the matrix is None where the product is scaled."""
    if node.target is not aten.addmm.default:
        return node.args[0], node.args[1], None
    bound = bind(node)
    plain = bound["beta"] == 1 and bound["alpha"] == 1 and bound["self"].meta["val"].dim() == 1
    return bound["mat1"], bound["mat2"] if plain else None, bound["self"]
