"""Images in channels last that XNNPACK's compiler mistakes: their program gets contiguous inputs instead."""

from __future__ import annotations

import torch
from torch.fx import Node

from ....ops import ADD, MUL, SUB

__all__ = ["mistakes_layout"]

_ELEMENTWISE = frozenset((*ADD, *MUL, *SUB))


def mistakes_layout(node: Node) -> bool:
    """Whether a program that holds this node, in this layout, fails when it runs (error 0x1 or 0x10)."""
    return _has_two_layouts(node.meta.get("val")) or _mixes_layouts(node)


def _has_two_layouts(value: object) -> bool:
    """An image of one channel whose strides are those of channels last, though it is contiguous as well."""
    if not isinstance(value, torch.Tensor) or not _is_channels_last(value):
        return False
    return isinstance(value.shape[1], int) and value.shape[1] == 1


def _mixes_layouts(node: Node) -> bool:
    """A sum, difference or product of an image with a tensor that has no such layout, such as a constant."""
    if node.target not in _ELEMENTWISE:
        return False
    images = [_is_channels_last(source.meta.get("val")) for source in node.all_input_nodes]
    return any(images) and not all(images)


def _is_channels_last(value: object) -> bool:
    if not isinstance(value, torch.Tensor) or value.dim() != 4 or tuple(value.shape[2:]) == (1, 1):
        return False
    stride = value.stride(1)
    return isinstance(stride, int) and stride == 1
