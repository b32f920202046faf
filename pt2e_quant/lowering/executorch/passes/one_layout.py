"""Copies to channels last become copies in order: XNNPACK lays its operands out itself.

ExecuTorch loses the layout that a copy asks for behind a quantize: a linear then reads channels for columns (1 dB where
36 are possible), an output has the sizes of another order and the runtime refuses it. Nothing else takes the layout in.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from ....arguments import bind, set_argument
from ....graph.module import tidy
from ....graph.values import with_value

__all__ = ["one_layout"]

aten = torch.ops.aten
_OTHERS = (torch.channels_last, torch.channels_last_3d)


def one_layout(gm: GraphModule) -> GraphModule:
    """Values stay, and so do sizes; results of the program are in order of their dimensions."""
    laid_out = [node for node in gm.graph.nodes if _asks_for_another(node)]
    for node in laid_out:
        set_argument(node, "memory_format", torch.contiguous_format)
        _in_order(node)
    if laid_out:
        for view in gm.graph.find_nodes(op="call_function", target=aten.view.default):
            view.target = aten.reshape.default  # what could be viewed in the other layout
    return tidy(gm) if laid_out else gm


def _asks_for_another(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and bind(node).get("memory_format") in _OTHERS


def _in_order(node: Node) -> None:
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        with_value(node, node, value.contiguous)
