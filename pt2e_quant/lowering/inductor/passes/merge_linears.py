"""Compute linears that read the same integers, as query, key and value do, by one with all of their outputs.

Weights have a scale for each output, so no value changes. One call on a wide weight takes less time than several.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ....graph.attributes import constant
from ....graph.module import tidy
from ....graph.write import Symbol, Writer, call
from ....meta import MERGED_KEY
from ....ops import ADD, CAT, LINEAR, is_call, is_quantize
from ...common.entry import origin
from ...common.gemm import Gemm, Q, gemms
from ..limits import AFTER_LINEAR, moves

__all__ = ["merge_linears"]

aten = torch.ops.aten
_FUSED = frozenset((*AFTER_LINEAR, *ADD))


def merge_linears(gm: GraphModule) -> GraphModule:
    """meta[MERGED_KEY] of the linear lists them by the names that they have in the converted graph."""
    groups: dict[Any, list[Gemm]] = defaultdict(list)
    for gemm in gemms(gm):
        if _can_merge(gemm):
            read = gemm.activation
            groups[read.target, read.args, tuple(read.kwargs.items()), gemm.bias is None].append(gemm)
    write = Writer(gm, "merge_linears", "_merged_")
    for group in groups.values():
        if len(group) > 1:
            _merge(write, group)
    return tidy(gm)


def _can_merge(gemm: Gemm) -> bool:
    """False where a kernel computes more than the product, and where the layout of the result can be seen outside."""
    if gemm.node.target not in LINEAR or not gemm.is_integer:
        return False
    stored = gemm.weight.target is Q.dequantize_per_channel.default and len(gemm.weight.all_input_nodes[0].users) == 1
    if not stored or any(constant(source) is None for source in (*gemm.weight.all_input_nodes, gemm.bias) if source):
        return False
    ends = [user for node in (gemm.node, *_views(gemm.node)) for user in node.users if user.op == "output"]
    return not ends and not any(is_quantize(user) or user.target in _FUSED for user in gemm.node.users)


def _views(node: Node) -> Iterator[Node]:
    """What only moves the values of a node, and of its views."""
    for user in node.users:
        if is_call(user) and (user.target in CAT or moves(user)):
            yield user
            yield from _views(user)


def _merge(write: Writer, group: list[Gemm]) -> None:
    first = group[0]

    def stacked(*parts: Node) -> Symbol:
        with write.origin(parts[0]):
            return write.constant(torch.cat([constant(part) for part in parts]).detach())  # type: ignore[misc]

    with write.before(first.node):
        codes = [stacked(*parts) for parts in zip(*(gemm.weight.all_input_nodes for gemm in group), strict=True)]
        weight = call(first.weight.target, *codes, *first.weight.args[len(codes) :])
        bias = None if first.bias is None else stacked(*(gemm.bias for gemm in group if gemm.bias))
        merged = call(aten.linear.default, write(first.activation), weight, bias)
        merged.node.meta[MERGED_KEY] = tuple(origin(gemm.node) for gemm in group)
        start = 0
        for gemm in group:
            end = start + len(constant(gemm.weight.all_input_nodes[0]))  # type: ignore[arg-type]
            for view in _views(gemm.node):
                if view.target is aten.view.default:  # of rows that no longer touch
                    view.target = aten.reshape.default
            with write.origin(gemm.node):
                gemm.node.replace_all_uses_with(merged.slice(-1, start, end).node)
            start = end
