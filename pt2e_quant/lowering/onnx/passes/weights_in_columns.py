"""Products of float inputs and integer weights in the one form that has a kernel: weights in columns, in blocks.

onnxruntime multiplies by weights of 4 and 8 bits (MatMulNBits) where a MatMul reads a DequantizeLinear of a constant
(inputs, outputs) with scales (inputs / block, outputs). A linear has its weight the other way round.

The kernel is lost where the MatMul reads a second DequantizeLinear, feeds a QuantizeLinear, or is joined with an Add to
a Gemm that then takes an activation. So biases are subtracted with the other sign, and where a neighbour is integers,
the input changes its sign, too: x W + b = x W - (-b) = b - (-x) W, bit by bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.onnx.ops import symbolic

from ....arguments import bind
from ....graph.attributes import constant
from ....graph.module import tidy
from ....graph.write import Symbol, Writer
from ....ops import LINEAR, is_dequantize
from ...common.gemm import Gemm, Q, gemms, output_quantize

__all__ = ["weights_in_columns"]

_AXIS: dict[Any, int] = {Q.dequantize_per_channel.default: 1, Q.dequantize_per_channel_group.default: 0}
"""Of DequantizeLinear: one scale for each output, or one for each block of inputs of each output."""


def weights_in_columns(gm: GraphModule) -> GraphModule:
    """Of linears whose input is float, or rounded for each row."""
    write = Writer(gm, "weights_in_columns")
    for gemm in gemms(gm):
        if gemm.node.target not in LINEAR or gemm.weight.target not in _AXIS or _multiplies_integers(gemm):
            continue
        weight = _columns(write, gemm)
        if weight is not None:
            with write.before(gemm.node):
                write.replace(gemm.node, _product(write, gemm, weight))
    return tidy(gm)


def _product(write: Writer, gemm: Gemm, weight: Symbol) -> Any:
    x, bias = write(gemm.node.args[0]), None if gemm.bias is None else write(gemm.bias)
    read = is_dequantize(gemm.node.args[0])
    if read or (bias is None and output_quantize(gemm.node, ()) is not None):
        product = (-x) @ weight
        return -product if bias is None else bias - product
    return x @ weight if bias is None else x @ weight - (-bias)


def _multiplies_integers(gemm: Gemm) -> bool:
    static = gemm.is_integer and not gemm.dynamic
    return static and gemm.weight.target is not Q.dequantize_per_channel_group.default


def _columns(write: Writer, gemm: Gemm) -> Symbol | None:
    bound = bind(gemm.weight)
    integers, scales, zeros = (constant(node) for node in gemm.weight.args[:3])
    if integers is None or scales is None or bound.get("axis", 0) != 0:
        return None
    scales = scales.detach().float()
    axis = _AXIS[gemm.weight.target]
    attributes = {"axis": axis}
    if axis == 0:
        attributes["block_size"] = integers.shape[1] // scales.shape[1]
    inputs = [integers, scales]
    if zeros is not None and bool(zeros.any()):
        inputs.append(zeros.to(integers.dtype))
    with write.before(gemm.node, like=gemm.weight):
        stored = [write.constant(_transposed(one)) for one in inputs]
        dtype, shape = gemm.weight.meta["val"].dtype, list(integers.t().shape)
        made = write.call(
            symbolic, "DequantizeLinear", stored, attributes, dtype=torch.float32, shape=shape, version=21
        )
        return made.to(dtype)  # type: ignore[no-any-return]


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.detach().t().contiguous() if tensor.dim() == 2 else tensor.detach()
