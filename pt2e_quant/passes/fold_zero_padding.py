"""Zeros around the input of a convolution become its padding."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from ..arguments import bind, set_argument
from ..checks import checked
from ..errors import CaptureError
from ..graph.module import tidy
from ..ops import pads_zeros

__all__ = ["fold_zero_padding"]

aten = torch.ops.aten


@checked(CaptureError)
def fold_zero_padding(gm: GraphModule) -> GraphModule:
    """Let a convolution pad by itself where zeros stand alike on both sides of its input: nothing comes between."""
    changed = False
    for target in (aten.conv1d.default, aten.conv2d.default):
        for conv in gm.graph.find_nodes(op="call_function", target=target):
            pad = conv.args[0]
            amounts = _even_zeros(pad, spatial=conv.meta["val"].dim() - 2) if "val" in conv.meta else None
            if amounts is not None:
                own = list(bind(conv)["padding"])
                own = own * len(amounts) if len(own) == 1 else own
                set_argument(conv, "padding", [a + b for a, b in zip(own, amounts, strict=True)])
                conv.replace_input_with(pad, pad.args[0])
                changed = True
    return tidy(gm) if changed else gm


def _even_zeros(pad: object, spatial: int) -> list[int] | None:
    """Zeros that a pad adds on each side, by spatial dimension from first to last; None when it does anything else."""
    if not isinstance(pad, Node) or not pads_zeros(pad):
        return None
    amounts = list(bind(pad)["pad"])
    if len(amounts) > 2 * spatial:
        return None
    sides = list(zip(amounts[::2], amounts[1::2], strict=True))
    if not all(isinstance(before, int) and before == after and before >= 0 for before, after in sides):
        return None
    return [before for before, _ in reversed(sides + [(0, 0)] * (spatial - len(sides)))]
