"""Write the product of two computed tensors with equal batch dimensions as bmm between views.

Of 2-d tensors ExecuTorch makes an mm, which XNNPACK leaves outside; of others an expand for each operand, which expands
nothing and cuts the delegate in two.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ....graph.attributes import constant
from ....graph.module import tidy
from ....graph.write import Symbol, Writer, function
from ....ops import is_dequantize
from .looks import literal_sizes, merged_batch

__all__ = ["matmul_to_bmm"]

aten = torch.ops.aten
bmm = function(aten.bmm.default)


def matmul_to_bmm(gm: GraphModule) -> GraphModule:
    """Where at most one size of each tensor is dynamic."""
    write = Writer(gm, "matmul_to_bmm")
    for node in [node for node in gm.graph.nodes if node.target in (aten.matmul.default, aten.mm.default)]:
        left, right = node.all_input_nodes[0], node.args[1]
        if not _multiplies_in_batches(left, right, node):
            continue
        with write.before(node):
            if node.meta["val"].dim() == 3:
                value = bmm(write(left), write(right))
            else:
                value = bmm(_merged(write(left)), _merged(write(right))).view(literal_sizes(node))
        write.replace(node, value)
    return tidy(gm)


def _multiplies_in_batches(left: Node, right: Node, product: Node) -> bool:
    """False for vectors, for factors of which one is broadcast, and for matrices that XNNPACK takes as weights."""
    if not all(isinstance(node.meta.get("val"), Tensor) for node in (left, right, product)):
        return False
    m, k, n = (literal_sizes(node) for node in (left, right, product))
    if any(sizes.count(-1) > 1 or 0 in sizes for sizes in (m, k, n)):
        return False
    if len(m) < 2 or len(m) != len(k) or m[:-2] != k[:-2]:
        return False
    return len(m) > 2 or not (_is_constant(left) or _is_constant(right))


def _merged(factor: Symbol) -> Symbol:
    return factor.reshape(merged_batch(literal_sizes(factor.node)) or [])  # type: ignore[no-any-return]


def _is_constant(node: Node) -> bool:
    return constant(node.args[0] if is_dequantize(node) else node) is not None
