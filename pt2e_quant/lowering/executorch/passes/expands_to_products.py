"""Write expand to fixed sizes as a product by ones: key and value heads that several query heads share."""

from __future__ import annotations

import math

import torch
from torch.fx import GraphModule, Node

from ....graph.module import tidy
from ....graph.write import Writer
from .looks import comes_from_integers, is_float32

__all__ = ["expands_to_products"]


def expands_to_products(gm: GraphModule) -> GraphModule:
    """Not of what is computed outside of any delegate anyway."""
    write = Writer(gm, "expands_to_products", "_ones_")
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.expand.default):
        factors = _factors(node)
        if factors is not None:
            with write.before(node):
                write.replace(node, write(node.args[0]) * write.constant(torch.ones(factors)))
    return tidy(gm)


def _factors(node: Node) -> list[int] | None:
    """How often each dimension is repeated; None where that changes nothing or is not known."""
    x = node.all_input_nodes[0]
    if not is_float32(node) or comes_from_integers(x):
        return None
    old, new = list(x.meta["val"].shape), list(node.meta["val"].shape)
    if sum(not isinstance(size, int) for size in new) > 1:
        return None  # the reshapes around it stay outside, and so does it
    old = [1] * (len(new) - len(old)) + old
    factors = [b if a == 1 else 1 for a, b in zip(old, new, strict=True)]
    return factors if all(isinstance(factor, int) for factor in factors) and math.prod(factors) > 1 else None
