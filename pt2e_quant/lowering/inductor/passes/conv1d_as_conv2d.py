"""Compute a convolution in one dimension as one of height 1: Inductor 2.13 infers a wrong length for the former."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from ....arguments import bind
from ....graph.attributes import constant
from ....graph.module import tidy
from ....graph.write import Writer
from ....ops import is_quantize
from ...common.gemm import gemms
from ..limits import AFTER_CONV

__all__ = ["conv1d_as_conv2d"]

aten = torch.ops.aten
_IN_TWO_DIMENSIONS: dict[Any, Any] = {
    aten.conv1d.default: aten.conv2d.default,
    aten.conv1d.padding: aten.conv2d.padding,
}


def conv1d_as_conv2d(gm: GraphModule) -> GraphModule:
    """Add a dimension before the kernel and take it away after the kernel."""
    write = Writer(gm, "conv1d_as_conv2d", "_height_one_")
    for gemm in gemms(gm):
        node = gemm.node
        if node.target not in _IN_TWO_DIMENSIONS or not gemm.is_integer:
            continue
        codes, values, bound = gemm.activation.args[0], constant(gemm.weight.args[0]), bind(node)
        if values is None:
            continue
        with write.before(gemm.weight):
            gemm.weight.update_arg(0, write.constant(values.unsqueeze(2)).node)
        with write.before(gemm.activation):
            gemm.activation.update_arg(0, write(codes).unsqueeze(2).node)
        padding = bound["padding"] if isinstance(bound["padding"], str) else [0, *bound["padding"]]
        steps = [1, *bound["stride"]], padding, [1, *bound["dilation"]], bound["groups"]
        node.target = _IN_TWO_DIMENSIONS[node.target]
        node.args, node.kwargs = (gemm.activation, gemm.weight, bound["bias"], *steps), {}
        write.follow(_end_of_kernel(node), lambda result: result.squeeze(2))
    return tidy(gm)


def _end_of_kernel(node: Node) -> Node:
    """The last of the elementwise ops, up to and with a quantize, that one kernel computes from here."""
    while len(node.users) == 1 and not is_quantize(node):
        (user,) = node.users
        if not (is_quantize(user) or user.target in AFTER_CONV):
            break
        node = user
    return node
