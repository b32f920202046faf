"""Rewrites that backends ask for before annotation (RuleQuantizer.transforms). Graph in, graph out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..graph import clone, free_name, insert_attribute, is_float_tensor, tidy
from ..ops import ADD, MUL, SUB

__all__ = ["lift_scalars"]


def lift_scalars(gm: GraphModule) -> GraphModule:
    """Turn the Python number of x + 1.0, x * 2.0 and x - 3.0 into a 0-d buffer, so that it can be quantized like a tensor.

    Only where x is floating point and the result has the dtype of x: an integer x + 1 stays as it is.
    """
    gm = clone(gm)
    names = free_name(gm, "_scalar_")
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.target not in (*ADD, *MUL, *SUB) or not is_float_tensor(node):
            continue
        tensor, number = (*node.args, None, None)[:2]
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not _same_dtype(node, tensor):
            continue
        with gm.graph.inserting_before(node):
            value = torch.tensor(float(number), dtype=node.meta["val"].dtype, device=node.meta["val"].device)
            node.update_arg(1, insert_attribute(gm, next(names), value, like=node, by="lift_scalars"))
    return tidy(gm)


def _same_dtype(node: Node, tensor: object) -> bool:
    value = tensor.meta.get("val") if isinstance(tensor, Node) else None
    return isinstance(value, Tensor) and value.dtype == node.meta["val"].dtype
