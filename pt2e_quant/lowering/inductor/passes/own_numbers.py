"""Keep the number that scales or shifts a float convolution as a tensor of its own.

Inductor folds such numbers into weights and biases. torch 2.13 stores each of them under one name (`other_tensor` in
binary_folding.py), so that of two numbers in a graph the last one counts for both; tensors keep their names. Of a
transposed convolution it takes the input channels for the output ones, and fails; it folds nothing of another dtype.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from ....graph.module import tidy
from ....graph.values import is_float_tensor
from ....graph.write import Writer
from ....ops import ADD, CONV, CONV_TRANSPOSE, DIV, MUL, SUB

__all__ = ["own_numbers"]

_FOLDED = frozenset((*ADD, *DIV, *MUL, *SUB))
_INTO = frozenset((*CONV, *CONV_TRANSPOSE))


def own_numbers(gm: GraphModule) -> GraphModule:
    """conv(x) * 0.5, and sums, differences and quotients like it, with the number as a buffer without dimensions."""
    write = Writer(gm, "own_numbers", "_number_")
    for node in list(gm.graph.nodes):
        if _is_folded(node):
            product, number = node.args
            value = node.meta["val"]
            dtype = torch.float64 if product.target in CONV_TRANSPOSE else value.dtype
            device = "cpu" if value.is_meta else value.device
            with write.before(node):
                node.update_arg(1, write.constant(torch.tensor(number, dtype=dtype, device=device)).node)
    return tidy(gm)


def _is_folded(node: Node) -> bool:
    if node.target not in _FOLDED or not is_float_tensor(node) or len(node.args) != 2:
        return False
    product, number = node.args
    return isinstance(number, float) and isinstance(product, Node) and product.target in _INTO
