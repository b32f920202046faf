"""Compute qparams at run time, and quantize with them, as the converted graph does.

Inductor 2.13 has decompositions of both, which do not: its qparams leave zero out of the range of numbers that are all
positive, or all negative; its quantize rounds after adding the zero point, and has no bounds.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule

from ....graph.module import tidy
from ....graph.write import Symbol, Writer, call

__all__ = ["run_time_qparams"]

aten = torch.ops.aten
Q = torch.ops.quantized_decomposed


def run_time_qparams(gm: GraphModule) -> GraphModule:
    """Write both in ATen ops: scales in float32 and zero points in int32, as kernels read them."""
    write = Writer(gm, "run_time_qparams")
    for choice in gm.graph.find_nodes(op="call_function", target=Q.choose_qparams.tensor):
        with write.before(choice):
            pair = _chosen(write(choice.args[0]), *choice.args[1:4])
        for part in list(choice.users):
            if part.target is operator.getitem:
                write.replace(part, pair[part.args[1]])
    for quantize in gm.graph.find_nodes(op="call_function", target=Q.quantize_per_tensor.tensor):
        x, scale, zero_point, low, high, dtype = quantize.args
        with write.before(quantize):
            write.replace(quantize, _quantized(write(x), write(scale), write(zero_point), low, high, dtype))
    return tidy(gm)


def _chosen(x: Symbol, low: int, high: int, eps: float) -> tuple[Symbol, Symbol]:
    """(scale, zero point) for the range of x, with zero in it."""
    smallest = call(aten.clamp_max.default, call(aten.amin.default, x), 0.0)
    largest = call(aten.clamp_min.default, call(aten.amax.default, x), 0.0)
    scale = call(aten.clamp_min.default, ((largest - smallest) / float(high - low)).to(torch.float32), eps)
    steps = call(aten.round.default, smallest / scale)
    zero_point = call(aten.clamp.default, call(aten.rsub.Scalar, steps, low), low, high)
    return scale, zero_point.to(torch.int32)


def _quantized(x: Symbol, scale: Symbol, zero_point: Symbol, low: int, high: int, dtype: torch.dtype) -> Symbol:
    inverse = _stored(call(aten.reciprocal.default, scale.to(torch.float32)))
    steps = call(aten.round.default, x.to(torch.float32) * inverse) + _stored(zero_point.to(torch.float32))
    return call(aten.clamp.default, steps, low, high).to(dtype)  # type: ignore[no-any-return]


def _stored(number: Symbol) -> Symbol:
    """Inductor would write the computation of a number into the loop that reads it, for every sixteen elements; what
    as_strided reads it stores."""
    return call(aten.as_strided.default, number, [*number.shape], [1] * len(number.shape))  # type: ignore[no-any-return]
