"""Quantized embedding tables become the kernels that ExecuTorch has for them.

The kernels read integers and scales of the rows that are asked for; without them a program would dequantize the whole
table, in every run.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ....arguments import bind
from ....graph.attributes import constant
from ....graph.module import tidy
from ....graph.write import Writer
from ....specs import FOUR_BITS
from ...common.gemm import Q
from .. import runtime

__all__ = ["embeddings_to_kernels", "stored_table"]

_ROWS = (Q.dequantize_per_channel.default, Q.dequantize_per_channel_group.default)
_BYTE = (-128, 127)


def embeddings_to_kernels(gm: GraphModule) -> GraphModule:
    """Replace dequantize and embedding by embedding_byte, or by embedding_4bit with two values in a byte."""
    write = Writer(gm, "embeddings_to_kernels", "_embedding_")
    tables: dict[object, tuple[Tensor, Tensor, Tensor | None] | None] = {}
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default):
        table = node.args[0]
        if table not in tables:
            tables[table] = stored_table(table)
        stored = tables[table]
        if stored is None:
            continue
        runtime.require_embeddings()
        four = stored[0].dtype is torch.uint8
        with write.before(node):
            parts = [None if one is None else write.constant(one).node for one in stored]
            kernel = (Q.embedding_4bit if four else Q.embedding_byte).default
            arguments = (*parts, *(FOUR_BITS if four else _BYTE), node.args[1])
            write.replace(node, write.call_with_value(kernel, arguments, {}, lambda node=node: node.meta["val"]))  # type: ignore[misc]
    return tidy(gm)


def stored_table(table: object) -> tuple[Tensor, Tensor, Tensor | None] | None:
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
    four = (bound["quant_min"], bound["quant_max"]) == FOUR_BITS and codes.shape[1] % 2 == 0
    offsets = zeros.to(torch.float32) if bool(zeros.any()) else None
    return (_packed(codes) if four else codes), scales.to(torch.float32), offsets


def _packed(codes: Tensor) -> Tensor:
    """uint8 with the values of two neighbours, shifted to 0..15: the first in the high bits."""
    shifted = (codes + 8).to(torch.uint8)
    return (shifted[:, ::2] << 4) | shifted[:, 1::2]
