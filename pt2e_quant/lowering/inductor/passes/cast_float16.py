"""Casts of their own around quantize and dequantize, of which Inductor has none for float16. For the end."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from ....graph.halves import widen
from ....graph.module import tidy
from ....graph.write import Writer
from ....ops import is_dequantize, is_quantize
from .float32_between_integers import leave

__all__ = ["cast_float16"]


def cast_float16(gm: GraphModule) -> GraphModule:
    """Quantize from float32, dequantize to float32."""
    write = Writer(gm, "cast_float16")
    for node in list(gm.graph.nodes):
        if is_quantize(node) and (source := node.all_input_nodes[0]).meta["val"].dtype is torch.float16:
            with write.before(node, like=source):
                node.replace_input_with(source, write(source).to(torch.float32).node)
        elif is_dequantize(node) and node.kwargs.get("out_dtype") is torch.float16:
            widen(node)
            leave(write, node, torch.float16)
    return tidy(gm)
