"""Nodes that compute in half precision: which they are, and how one of them comes to return float32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from .values import with_value

__all__ = ["is_half", "widen"]


def is_half(node: Node) -> bool:
    """Whether a node returns one tensor in bfloat16 or float16."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)


def widen(node: Node) -> None:
    """Let a node return float32; its operands are the caller's to widen."""
    value = node.meta["val"]
    node.kwargs = {key: given for key, given in node.kwargs.items() if key != "out_dtype"}
    with_value(node, node, lambda: value.to(torch.float32))
