"""What to say of ops that look up by indices which rounding may have changed: an argmax of quantized values."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch.fx import Node

from ..graph.values import is_float_tensor
from ..ops import is_value_preserving
from ..specs import EdgeOrNode

__all__ = ["rounded_indices"]

_FAR = 64
"""Ops between a decision and the look-up that are searched; index arithmetic is short, and graphs are long."""


def rounded_indices(node: Node, resolved: Container[EdgeOrNode]) -> str:
    """An addition to the reason why a look-up stays in float; empty where no quantized value decides its indices.

    Args:
        node: an op that returns floating point.
        resolved: what is quantized: tensors, for all readers, and (tensor, reader).
    """
    waiting, seen = [source for source in node.all_input_nodes if _is_integer(source)], set[Node]()
    while waiting and len(seen) < _FAR:
        decides = waiting.pop()
        seen.add(decides)
        for source in decides.all_input_nodes:
            rounded = _rounded(source, decides, resolved) if is_float_tensor(source) else None
            if rounded is not None:
                return (
                    f"; its indices come from {decides.name}, which reads quantized values of {rounded.name}: "
                    "those within a step of each other may change places"
                )
            if not is_float_tensor(source) and source not in seen:
                waiting.append(source)
    return ""


def _is_integer(node: Node) -> bool:
    dtype = getattr(node.meta.get("val"), "dtype", torch.bool)
    return not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool


def _rounded(source: Node, reader: Node, resolved: Container[EdgeOrNode]) -> Node | None:
    """The quantized tensor whose values a reader sees, maybe moved; None where they are not on a grid."""
    while source not in resolved and (source, reader) not in resolved:
        if not is_value_preserving(source) or not source.all_input_nodes:
            return None
        source, reader = source.all_input_nodes[0], source
    return source
