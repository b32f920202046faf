"""The number of x + 1.0, x * 2.0 and x - 3.0 becomes a tensor, so that it can be quantized like one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..checks import checked
from ..errors import CaptureError
from ..graph.attributes import free_name, insert_attribute
from ..graph.module import tidy
from ..graph.values import is_float_tensor
from ..ops import ADD, MUL, SUB

__all__ = ["lift_scalars"]

_WITH_SCALARS = frozenset((*ADD, *MUL, *SUB))


@checked(CaptureError)
def lift_scalars(gm: GraphModule) -> GraphModule:
    """Store the number in a 0-d buffer, only where x is floating point and the result has the dtype of x.

    An integer x + 1 stays as it is.
    """
    names = free_name(gm, "_scalar_")
    found = [node for node in gm.graph.nodes if _has_scalar(node)]
    for node in found:
        like = node.meta["val"]
        value = torch.tensor(float(node.args[1]), dtype=like.dtype, device="cpu" if like.is_meta else like.device)
        with gm.graph.inserting_before(node):
            node.update_arg(1, insert_attribute(gm, next(names), value, like=node, by="lift_scalars"))
    return tidy(gm) if found else gm


def _has_scalar(node: Node) -> bool:
    if node.op != "call_function" or node.target not in _WITH_SCALARS or not is_float_tensor(node):
        return False
    tensor, number = (*node.args, None, None)[:2]
    return isinstance(number, (int, float)) and not isinstance(number, bool) and _same_dtype(node, tensor)


def _same_dtype(node: Node, tensor: object) -> bool:
    value = tensor.meta.get("val") if isinstance(tensor, Node) else None
    return isinstance(value, Tensor) and value.dtype == node.meta["val"].dtype
