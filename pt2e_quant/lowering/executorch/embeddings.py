"""Embedding tables that are weights of linears as well: what it costs that their kernels read different layouts."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from ...graph.attributes import constant
from ...ops import EMBEDDING, LINEAR, is_dequantize
from ..common.entry import origin
from ..common.program import Remark
from .passes.embeddings_to_kernels import stored_table

__all__ = ["tied_tables"]


def tied_tables(gm: GraphModule) -> tuple[Remark, ...]:
    """One remark a table, for a program in which XNNPACK has the linears.

    XNNPACK keeps weights in the layout of its kernels, beside the constants that embeddings read: the file has both.
    """
    linears = {_weight_of(node, 1): origin(node) for node in gm.graph.nodes if node.target in LINEAR}
    remarks: dict[str, Remark] = {}
    for node in gm.graph.nodes:
        name = _weight_of(node, 0) if node.target in EMBEDDING else None
        if name is None or name not in linears:
            continue
        size = sum(one.nbytes for one in stored_table(node.args[0]) or (constant(node.args[0]),) if one is not None)
        text = (
            f"its table is also the weight of {linears[name]}; their kernels read different layouts, so the file has "
            f"it twice, {size} bytes more than once"
        )
        remarks.setdefault(name, Remark(origin(node), text))
    return tuple(remarks.values())


def _weight_of(node: Node, position: int) -> str | None:
    """Name of the parameter or buffer that holds the table or weight."""
    value: Any = node.args[position]
    if is_dequantize(value):
        value = value.args[0]
    return str(value.target) if isinstance(value, Node) and value.op == "get_attr" else None
