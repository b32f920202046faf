"""Write scaled_dot_product_attention as the products, sums and softmax that it stands for.

A backend that has no attention kernel gets a decomposition from torch that guards every row of every layer against
being fully masked: eight more operators each time. Here the mask is turned into numbers to add, once for all layers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..arguments import bind
from ..graph.module import tidy
from ..graph.values import refresh_values
from ..graph.write import emit

__all__ = ["decompose_attention"]

aten = torch.ops.aten
_BY = "decompose_attention"


def decompose_attention(gm: GraphModule) -> GraphModule:
    """Replace each call of scaled_dot_product_attention in inference.

    Values agree up to rounding, with one exception: rows whose every position is masked, which torch sets to zero.
    A boolean mask keeps that; behind a mask of numbers that is computed while running, such a row becomes the mean of
    the values, as in the usual implementation with finite numbers.
    """
    calls = gm.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    masks = _Masks()
    written = []
    for node in calls:
        if not bind(node)["dropout_p"]:
            with gm.graph.inserting_before(node):
                written.append(_attention(node, masks))
            _turn_views_into_reshapes(node)
            node.replace_all_uses_with(written[-1])
            gm.graph.erase_node(node)
    refresh_values(gm, written)
    return tidy(gm) if calls else gm


def _turn_views_into_reshapes(node: Node) -> None:
    """torch's kernel returns heads and positions exchanged in memory: a view fits where now a copy is needed."""
    front = [node]
    while front:
        for user in front.pop().users:
            if user.target in (aten.transpose.int, aten.permute.default):
                front.append(user)
            elif user.target is aten.view.default:
                user.target = aten.reshape.default


def _attention(node: Node, masks: _Masks) -> Node:
    bound = bind(node)
    query, key, value, mask = (bound[name] for name in ("query", "key", "value", "attn_mask"))
    shape = query.meta["val"].shape
    if bound["enable_gqa"]:
        groups = shape[-3] // key.meta["val"].shape[-3]
        key, value = (_repeat_heads(node, one, groups) for one in (key, value))
    if bound["is_causal"]:
        mask = masks.causal(node, query, key)
    scale = 1 / math.sqrt(shape[-1]) if bound["scale"] is None else bound["scale"]
    query = emit(node, _BY, aten.mul.Tensor, query, scale)
    scores = emit(node, _BY, aten.matmul.default, query, emit(node, _BY, aten.transpose.int, key, -2, -1))
    alive = None
    if mask is not None:
        added, alive = masks.as_numbers(node, mask, query.meta["val"].dtype)
        scores = emit(node, _BY, aten.add.Tensor, scores, added)
    weights = emit(node, _BY, aten.softmax.int, scores, -1)
    mixed = emit(node, _BY, aten.matmul.default, weights, value)
    return mixed if alive is None else emit(node, _BY, aten.mul.Tensor, mixed, alive)


def _repeat_heads(node: Node, heads: Node, groups: int) -> Node:
    """(..., heads, length, width) with each head `groups` times in a row."""
    *batch, count, length, width = _sizes(node, heads)
    wide = emit(node, _BY, aten.unsqueeze.default, heads, -3)
    wide = emit(node, _BY, aten.expand.default, wide, [-1] * (len(batch) + 1) + [groups, -1, -1])
    return emit(node, _BY, aten.reshape.default, wide, [*batch, count * groups, length, width])


def _sizes(node: Node, tensor: Node) -> list[Any]:
    """The sizes as literals, or as calls of sym_size where they are dynamic."""
    shape = tensor.meta["val"].shape
    return [
        size if isinstance(size, int) else emit(node, _BY, aten.sym_size.int, tensor, index)
        for index, size in enumerate(shape)
    ]


class _Masks:
    """Masks as numbers, made at the first attention that needs them and shared by all later ones."""

    def __init__(self) -> None:
        self._causal: dict[tuple[str, str], Node] = {}
        self._numbers: dict[tuple[Node, torch.dtype], tuple[Node, Node | None]] = {}

    def causal(self, node: Node, query: Node, key: Node) -> Node:
        """True where a query may see a key: those up to its own position, counted from the first."""
        lengths = str(query.meta["val"].shape[-2]), str(key.meta["val"].shape[-2])
        if lengths not in self._causal:
            sizes = [_sizes(node, query)[-2], _sizes(node, key)[-2]]
            ones = emit(node, _BY, aten.new_ones.default, query, sizes, dtype=torch.bool)
            self._causal[lengths] = emit(node, _BY, aten.tril.default, ones)
        return self._causal[lengths]

    def as_numbers(self, node: Node, mask: Node, dtype: torch.dtype) -> tuple[Node, Node | None]:
        """What to add to the scores; and, of boolean masks, 0.0 for each row that is fully masked, else 1.0.

        Finite numbers, since a row of -inf makes softmax NaN.
        """
        if (mask, dtype) not in self._numbers:
            self._numbers[mask, dtype] = self._make_numbers(node, mask, dtype)
        return self._numbers[mask, dtype]

    def _make_numbers(self, node: Node, mask: Node, dtype: torch.dtype) -> tuple[Node, Node | None]:
        lowest = torch.finfo(dtype).min
        if mask.meta["val"].dtype is not torch.bool:
            return emit(node, _BY, aten.clamp.default, mask, lowest), None
        added = emit(node, _BY, aten.to.dtype, emit(node, _BY, aten.where.Scalar, mask, 0.0, lowest), dtype)
        if mask in self._causal.values():
            return added, None  # every query sees the first key
        return added, emit(node, _BY, aten.to.dtype, emit(node, _BY, aten.any.dim, mask, -1, True), dtype)
