"""Write out the factors of sums: kernels take a plain add or addmm, and some backends drop alpha and beta unseen."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..arguments import bind
from ..graph.module import tidy
from ..graph.write import Symbol, Writer, call
from ..ops import ADD, SUB, is_call

__all__ = ["spell_out_sums"]

aten = torch.ops.aten


def spell_out_sums(gm: GraphModule) -> GraphModule:
    """a + alpha * b, a - alpha * b, and beta * c + alpha * (a @ b), with factors as products of their own."""
    write = Writer(gm, "spell_out_sums")
    for node in list(gm.graph.nodes):
        if not is_call(node) or node.target not in (*ADD, *SUB, aten.addmm.default):
            continue
        if any(bind(node).get(name, 1) != 1 for name in ("alpha", "beta")):
            with write.before(node):
                written = _product_and_sum(node, write) if "mat1" in bind(node) else _sum(node, write)
            write.replace(node, written)
    return tidy(gm)


def _sum(node: Node, write: Writer) -> Symbol:
    bound = bind(node)
    first, other = write(bound["self"]), bound["other"]
    product = _times(write(other) if isinstance(other, Node) else other, bound["alpha"])
    return first - product if node.target in SUB else first + product  # type: ignore[no-any-return]


def _product_and_sum(node: Node, write: Writer) -> Symbol:
    """torch does not look at what is added when beta is 0, not even at NaN."""
    bound = bind(node)
    product = _times(call(aten.mm.default, write(bound["mat1"]), write(bound["mat2"])), bound["alpha"])
    beta = bound["beta"]
    return product if beta == 0 else product + _times(write(bound["self"]), beta)  # type: ignore[no-any-return]


def _times(value: Any, factor: Any) -> Any:
    return value if factor == 1 else value * factor
