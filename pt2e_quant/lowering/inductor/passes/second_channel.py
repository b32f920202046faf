"""Give a convolution of one channel a second one of zeros, where sizes are dynamic.

The layout of one channel can be read both ways. With dynamic sizes Inductor 2.13 takes the output for contiguous, while
the kernel writes channels last: an assertion when compiled, wrong numbers in a package.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ....graph.attributes import constant
from ....graph.module import tidy
from ....graph.write import Writer, call
from ....grid import Grid
from ....ops import CONV, is_dequantize
from ...common.gemm import gemms

__all__ = ["second_channel"]

aten = torch.ops.aten


def second_channel(gm: GraphModule) -> GraphModule:
    """Pad the codes with zero points, and the weight with zeros."""
    write = Writer(gm, "second_channel", "_two_channels_")
    for gemm in gemms(gm):
        if gemm.node.target not in CONV or not _is_one_dynamic_channel(gemm.activation):
            continue
        codes, values, grid = gemm.activation.args[0], constant(gemm.weight.args[0]), Grid.of(gemm.activation)
        if values is None or grid is None:
            continue
        amounts = [*[0, 0] * (values.dim() - 2), 0, 1]
        with write.before(gemm.weight):
            gemm.weight.update_arg(0, write.constant(torch.nn.functional.pad(values, amounts)).node)
        with write.before(gemm.activation):
            padded = call(aten.constant_pad_nd.default, write(codes), amounts, grid.zero_point)
            gemm.activation.update_arg(0, padded.node)
    return tidy(gm)


def _is_one_dynamic_channel(activation: Node) -> bool:
    value = activation.meta.get("val")
    if not is_dequantize(activation) or not isinstance(value, Tensor) or value.dim() not in (3, 4):
        return False
    return value.shape[1] == 1 and not all(isinstance(size, int) for size in value.shape)
