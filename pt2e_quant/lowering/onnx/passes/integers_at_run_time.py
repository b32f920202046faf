"""Linears whose input becomes integers while running: DynamicQuantizeLinear and MatMulInteger, which make one kernel.

A quantize-dequantize pair with computed qparams would be multiplied in float. DynamicQuantizeLinear chooses uint8; the
grid of int8 with the same range is the same one, shifted by 128.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.onnx.ops import symbolic, symbolic_multi_out

from ....arguments import bind
from ....graph.attributes import constant
from ....graph.module import tidy
from ....graph.write import Symbol, Writer
from ....ops import LINEAR
from ...common.gemm import Gemm, Q, gemms
from ..limits import run_time_grid
from .sizes import sizes_of

__all__ = ["integers_at_run_time"]


def integers_at_run_time(gm: GraphModule) -> GraphModule:
    """Of linears with qparams of the whole tensor and a weight of zero point 0; other inputs stay rounded floats."""
    write = Writer(gm, "integers_at_run_time")
    for gemm in gemms(gm):
        weight, scales = constant(gemm.weight.args[0]), _scales(gemm)
        if weight is not None and scales is not None and _is_chosen_for_all(gemm):
            with write.before(gemm.node):
                write.replace(gemm.node, _product(write, gemm, weight.detach(), scales))
    return tidy(gm)


def _is_chosen_for_all(gemm: Gemm) -> bool:
    """One pair of qparams for a whole input of float32."""
    if gemm.node.target not in LINEAR or not gemm.dynamic:
        return False
    is_float32 = gemm.activation.meta["val"].dtype is torch.float32
    if gemm.activation.target is not Q.dequantize_per_tensor.tensor or not is_float32:
        return False
    bound = bind(gemm.activation)
    chosen = bound["scale"].args[0]
    return chosen.target is Q.choose_qparams.tensor and run_time_grid(bound["quant_min"], bound["quant_max"]) is None


def _scales(gemm: Gemm) -> Tensor | None:
    """Of the weight, float32; None where it has a zero point, or groups."""
    bound = bind(gemm.weight)
    if gemm.weight.target is Q.dequantize_per_tensor.default:
        return None if bound["zero_point"] else torch.tensor(bound["scale"], dtype=torch.float32)
    if gemm.weight.target is not Q.dequantize_per_channel.default or bound["axis"] != 0:
        return None
    scales, zeros = constant(bound["scales"]), constant(bound["zero_points"])
    return None if scales is None or (zeros is not None and bool(zeros.any())) else scales.detach().float()


def _product(write: Writer, gemm: Gemm, weight: Tensor, scales: Tensor) -> Symbol:
    x = gemm.activation.args[0].args[0]  # type: ignore[union-attr]
    shape = sizes_of(write(x))
    made = write.call(
        symbolic_multi_out, "DynamicQuantizeLinear", [x], {},
        dtypes=[torch.uint8, torch.float32, torch.uint8], shapes=[shape, [], []], version=11,
    )  # fmt: skip
    columns, zero = write.constant(weight.t().contiguous()), write.constant(torch.zeros((), dtype=weight.dtype))
    sums = write.call(
        symbolic, "MatMulInteger", [made[0], columns, made[2], zero], {},
        dtype=torch.int32, shape=[*shape[:-1], len(weight)], version=10,
    )  # fmt: skip
    value: Symbol = sums.to(torch.float32) * (made[1] * write.constant(scales))
    return value if gemm.bias is None else value + write(gemm.bias)
