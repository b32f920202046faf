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
from ..graph.write import Symbol, Writer, function
from ..meta import DROPOUT_P_KEY, marks
from ..ops import ATTENTION

__all__ = ["decompose_attention"]

aten = torch.ops.aten
softmax, transpose, expand = function(aten.softmax.int), function(aten.transpose.int), function(aten.expand.default)
dropout = function(aten.dropout.default)


def decompose_attention(gm: GraphModule) -> GraphModule:
    """Replace each call of scaled_dot_product_attention in inference.

    Values agree up to rounding, with one exception: rows whose every position is masked, which torch sets to zero.
    A boolean mask keeps that; after a mask of numbers that is computed while running, such a row becomes the mean of
    the values, as in the usual implementation with finite numbers. What drops in training gets a dropout.
    """
    calls = [node for node in gm.graph.nodes if node.target in ATTENTION]
    write = Writer(gm, "decompose_attention")
    masks = _Masks()
    written = []
    for node in calls:
        if not bind(node)["dropout_p"]:
            with write.before(node):
                value = _attention(node, masks, write)
            _turn_views_into_reshapes(node)
            written.append(write.replace(node, value))
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


def _attention(node: Node, masks: _Masks, write: Writer) -> Any:
    bound = bind(node)
    query, key, value = (write(bound[name]) for name in ("query", "key", "value"))
    mask = bound["attn_mask"]
    shape = query.shape
    if bound["enable_gqa"]:
        groups = shape[-3] // key.shape[-3]
        key, value = _repeat_heads(key, groups), _repeat_heads(value, groups)
    if bound["is_causal"]:
        mask = masks.causal(query, key)
    scale = 1 / math.sqrt(shape[-1]) if bound["scale"] is None else bound["scale"]
    scores = (query * scale) @ transpose(key, -2, -1)
    alive = None
    if mask is not None:
        added, alive = masks.as_numbers(write(mask), query.dtype)
        scores = scores + added
    weights, probability = softmax(scores, -1), marks(node).get(DROPOUT_P_KEY)
    mixed = (weights if probability is None else dropout(weights, probability, False)) @ value
    return mixed if alive is None else mixed * alive


def _repeat_heads(heads: Symbol, groups: int) -> Any:
    """(..., heads, length, width) with each head `groups` times in a row."""
    *batch, count, length, width = _sizes(heads)
    wide = expand(heads.unsqueeze(-3), [-1] * (len(batch) + 1) + [groups, -1, -1])
    return wide.reshape([*batch, count * groups, length, width])


def _sizes(tensor: Symbol) -> list[Any]:
    """The sizes as literals, or as calls of sym_size where they are dynamic."""
    size_of = function(aten.sym_size.int)
    return [size if isinstance(size, int) else size_of(tensor, index) for index, size in enumerate(tensor.shape)]


class _Masks:
    """Masks as numbers, made at the first attention that needs them and shared by all later ones."""

    def __init__(self) -> None:
        self._causal: dict[tuple[str, str], Symbol] = {}
        self._numbers: dict[tuple[Node, torch.dtype], tuple[Any, Any | None]] = {}

    def causal(self, query: Symbol, key: Symbol) -> Symbol:
        """True where a query may see a key: those up to its own position, counted from the first."""
        lengths = str(query.shape[-2]), str(key.shape[-2])
        if lengths not in self._causal:
            sizes = [_sizes(query)[-2], _sizes(key)[-2]]
            ones = function(aten.new_ones.default)(query, sizes, dtype=torch.bool)
            self._causal[lengths] = function(aten.tril.default)(ones)
        return self._causal[lengths]

    def as_numbers(self, mask: Symbol, dtype: torch.dtype) -> tuple[Any, Any | None]:
        """What to add to the scores; and, of boolean masks, 0.0 for each row that is fully masked, else 1.0.

        Finite numbers, since a row of -inf makes softmax NaN.
        """
        if (mask.node, dtype) not in self._numbers:
            self._numbers[mask.node, dtype] = self._make_numbers(mask, dtype)
        return self._numbers[mask.node, dtype]

    def _make_numbers(self, mask: Symbol, dtype: torch.dtype) -> tuple[Any, Any | None]:
        lowest = torch.finfo(dtype).min
        if mask.dtype is not torch.bool:
            return function(aten.clamp.default)(mask, lowest), None
        added = function(aten.where.Scalar)(mask, 0.0, lowest).to(dtype)
        if any(mask.node is causal.node for causal in self._causal.values()):
            return added, None  # every query sees the first key
        return added, function(aten.any.dim)(mask, -1, True).to(dtype)
