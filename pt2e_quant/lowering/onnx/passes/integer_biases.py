"""Biases as int32 on the grid of the products, for linears that end in float.

onnxruntime brings the bias of a product that ends in integers onto this grid by itself, and multiplies in float where
it has to add a float bias to a float result.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule

from ....arguments import bind
from ....graph.attributes import constant
from ....graph.module import tidy
from ....graph.write import Symbol, Writer
from ....grid import Grid
from ....ops import LINEAR, RELUS
from ...common.gemm import Gemm, Q, gemms, output_quantize

__all__ = ["integer_biases"]

_INT32 = torch.iinfo(torch.int32)


def integer_biases(gm: GraphModule) -> GraphModule:
    """b becomes round(b / (scale[x] * scale[w])); one that leaves int32 stays what it is."""
    write = Writer(gm, "integer_biases")
    for gemm in gemms(gm):
        bias, scales = constant(gemm.bias), _scales_of_products(gemm)
        if (
            gemm.node.target not in LINEAR
            or output_quantize(gemm.node, RELUS) is not None
            or bias is None
            or scales is None
        ):
            continue
        steps = (bias.detach().double() / scales.double()).round()
        if bool((steps.abs() <= _INT32.max).all()):
            with write.before(gemm.node):
                gemm.node.update_arg(2, _dequantized(write, steps.to(torch.int32), scales).node)
    return tidy(gm)


def _scales_of_products(gemm: Gemm) -> Tensor | None:
    """float32, one for each output feature."""
    grid, given = Grid.of(gemm.activation), bind(gemm.weight)
    scales = given["scale"] if "scale" in given else constant(given.get("scales"))
    is_float32 = gemm.node.meta["val"].dtype is torch.float32
    if grid is None or scales is None or not is_float32 or gemm.weight.target is Q.dequantize_per_channel_group.default:
        return None
    features = gemm.weight.meta["val"].shape[0]
    return (torch.as_tensor(scales, dtype=torch.float32).detach() * grid.scale).expand(features).contiguous()


def _dequantized(write: Writer, integers: Tensor, scales: Tensor) -> Symbol:
    grid = write.constant(scales), write.constant(torch.zeros_like(integers, dtype=torch.int64))
    bounds = _INT32.min, _INT32.max, torch.int32
    return write.call(Q.dequantize_per_channel.default, write.constant(integers), *grid, 0, *bounds)
