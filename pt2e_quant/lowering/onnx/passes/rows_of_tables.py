"""Tables of integers: the rows that are looked up become real numbers, and not the whole table in every run."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ....graph.module import tidy
from ....graph.write import Symbol, Writer, call
from ...common.stored import Stored, stored

__all__ = ["rows_of_tables"]

aten = torch.ops.aten


def rows_of_tables(gm: GraphModule) -> GraphModule:
    """Of embeddings whose table has scales for its rows, or for groups in them."""
    write = Writer(gm, "rows_of_tables")
    for node in gm.graph.find_nodes(op="call_function", target=aten.embedding.default):
        table = stored(node.args[0])
        if table is not None:
            with write.before(node):
                write.replace(node, _rows(write, node, table))
    return tidy(gm)


def _rows(write: Writer, node: Node, table: Stored) -> Symbol:
    def looked_up(of: Tensor | Node) -> Symbol:
        held = write.constant(of) if isinstance(of, Tensor) else of
        return write.call(aten.embedding.default, held, node.args[1])

    codes: Node = table.node.args[0]  # type: ignore[assignment]
    value = looked_up(codes).to(torch.float32)
    value = call(aten.unflatten.int, value, -1, [table.scales.shape[1], table.group])
    if bool(table.zeros.any()):
        value = value - looked_up(table.zeros).unsqueeze(-1)
    value = (value * looked_up(table.scales).unsqueeze(-1)).flatten(-2, -1)
    return value.to(node.meta["val"].dtype)  # type: ignore[no-any-return]
