"""Write out the factors of sums: Inductor's patterns for integer kernels match an add, or addmm, and drop them."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from ....arguments import bind
from ....graph.module import tidy
from ....graph.write import Writer, call
from ....ops import ADD, is_call

__all__ = ["spell_out_sums"]

aten = torch.ops.aten


def spell_out_sums(gm: GraphModule) -> GraphModule:
    """a + alpha * b, and beta * c + alpha * (a @ b), with factors as products of their own."""
    write = Writer(gm, "spell_out_sums")
    for node in list(gm.graph.nodes):
        if not is_call(node) or node.target not in (*ADD, aten.addmm.default):
            continue
        bound = bind(node)
        alpha, beta = bound["alpha"], bound.get("beta", 1)
        if (alpha, beta) == (1, 1):
            continue
        with write.before(node):
            if node.target is aten.addmm.default:
                product = call(aten.mm.default, write(bound["mat1"]), write(bound["mat2"]))
                written = write(bound["self"]) * beta + product * alpha
            else:
                other = bound["other"]
                written = write(bound["self"]) + (write(other) if isinstance(other, Node) else other) * alpha
        write.replace(node, written)
    return tidy(gm)
