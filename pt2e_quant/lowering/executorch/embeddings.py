"""Quantized embedding tables become the kernels that ExecuTorch has for them.

The kernels read integers and scales of the rows that are asked for; without them a program would dequantize the whole
table, in every run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ...arguments import bind
from ...graph.attributes import constant, free_name, insert_attribute
from ...graph.module import tidy
from ...ops import EMBEDDING, LINEAR, is_dequantize
from ...where import copy_origin
from ..common.entry import origin
from ..common.gemm import Q
from ..common.remarks import Remark
from . import runtime as _executorch

__all__ = ["embeddings_to_kernels", "tied_tables"]

aten = torch.ops.aten
_ROWS = (Q.dequantize_per_channel.default, Q.dequantize_per_channel_group.default)


def embeddings_to_kernels(gm: GraphModule) -> GraphModule:
    """Replace dequantize and embedding by embedding_byte, or by embedding_4bit with two values in a byte."""
    names = free_name(gm, "_embedding_")
    tables: dict[Node, tuple[Node | None, ...]] = {}
    for node in gm.graph.find_nodes(op="call_function", target=aten.embedding.default):
        table = node.args[0]
        stored = _stored(table)
        if stored is None:
            continue
        _executorch.require_embeddings()
        with gm.graph.inserting_before(node):
            if table not in tables:
                tables[table] = tuple(
                    None if one is None else insert_attribute(gm, next(names), one, like=table, by="lowering")
                    for one in stored
                )
            four = stored[0].dtype is torch.uint8
            kernel = (Q.embedding_4bit if four else Q.embedding_byte).default
            limits = (-8, 7) if four else (-128, 127)
            new = gm.graph.call_function(kernel, (*tables[table], *limits, node.args[1]))
        copy_origin(new, node, "lowering")
        new.meta |= {key: node.meta[key] for key in ("val", "tensor_meta") if key in node.meta}
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    return tidy(gm)


def tied_tables(gm: GraphModule) -> tuple[Remark, ...]:
    """Tables that are weights of linears as well, for a program in which XNNPACK has the linears.

    XNNPACK keeps weights in the layout of its kernels, beside the constants that embeddings read: the file has both.
    """
    linears = {_weight_of(node, 1): origin(node) for node in gm.graph.nodes if node.target in LINEAR}
    remarks: dict[str, Remark] = {}
    for node in gm.graph.nodes:
        name = _weight_of(node, 0) if node.target in EMBEDDING else None
        if name is None or name not in linears:
            continue
        size = sum(one.nbytes for one in _stored(node.args[0]) or (constant(node.args[0]),) if one is not None)
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


def _stored(table: object) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """(integers, scales, zero points unless all are 0), as the kernels read them; None for what they do not take.

    They take integers stored as int8, with scales for rows or groups in rows, and return float32.
    """
    if not isinstance(table, Node) or table.target not in _ROWS:
        return None
    codes, scales, zeros = (constant(one) for one in table.args[:3])
    if codes is None or scales is None or zeros is None or codes.dim() != 2 or codes.dtype is not torch.int8:
        return None
    bound, value = bind(table), table.meta.get("val")
    if bound.get("axis", 0) != 0 or not isinstance(value, Tensor) or value.dtype is not torch.float32:
        return None
    four = (bound["quant_min"], bound["quant_max"]) == (-8, 7) and codes.shape[1] % 2 == 0
    offsets = zeros.to(torch.float32) if bool(zeros.any()) else None
    return (_packed(codes) if four else codes), scales.to(torch.float32), offsets


def _packed(codes: Tensor) -> Tensor:
    """uint8 with the values of two neighbours, shifted to 0..15: the first in the high bits."""
    shifted = (codes + 8).to(torch.uint8)
    return (shifted[:, ::2] << 4) | shifted[:, 1::2]
