"""Tensors that hold a mask: numbers so large that next to them all others would round to one.

Attention adds 0 where it may look and -inf, or the lowest number of the dtype, where it must not. An observer of such a
tensor, or of the sum with it, would see a range that no real value needs. Rules refuse them with a reason.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Graph, Node

from ..arguments import bind
from ..graph.values import is_float_tensor
from ..ops import ADD, ATTENTION, CLAMP, HARDTANH, RELU6, SOFTMAX

__all__ = ["HUGE", "MASK_REASON", "masked"]

HUGE = 1e6
"""From this magnitude on, a number says 'not this one'."""

MASK_REASON = "it holds an attention mask; next to its numbers all other values would round to one"

aten = torch.ops.aten
_BOUNDED = frozenset((*SOFTMAX, *ATTENTION, *HARDTANH, *RELU6, aten.sigmoid.default, aten.tanh.default))


def masked(graph: Graph) -> set[Node]:
    """Float tensors that a huge literal was written into, what is computed from them, and sums that softmax reads.

    A softmax (also that of attention), sigmoid, tanh or clamp ends the spread. Huge constant tensors are for the rules
    to look at.
    """
    found: set[Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or not is_float_tensor(node):
            continue
        if node.target in SOFTMAX and node.all_input_nodes[0].target in ADD:
            found.add(node.all_input_nodes[0])  # scores and mask: any mask, also one that is an input of the model
        writes = node.target not in CLAMP and any(_is_huge(value) for value in (*node.args, *node.kwargs.values()))
        if writes or (not _is_bounded(node) and not found.isdisjoint(node.all_input_nodes)):
            found.add(node)
    return found


def _is_bounded(node: Node) -> bool:
    if node.target in CLAMP:
        ends = [value for name, value in bind(node).items() if name in ("min", "max")]
        return len(ends) == 2 and all(end is not None and not _is_huge(end) for end in ends)
    return node.target in _BOUNDED


def _is_huge(value: Any) -> bool:
    return isinstance(value, float) and (math.isinf(value) or abs(value) >= HUGE)
