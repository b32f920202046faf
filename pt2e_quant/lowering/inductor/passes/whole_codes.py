"""Quantize to all codes of a dtype, and clamp where a grid has fewer: kernels saturate at the bounds of the dtype.

Grids of 7 bits (reduce_range) and others that end early are written so in the converted graph, and Inductor's patterns
drop their bounds.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import GraphModule, Node

from ....graph.module import tidy
from ....graph.write import Symbol, Writer, call
from ....grid import Grid
from ....ops import CONV, is_quantize
from ...common.gemm import as_gemm

__all__ = ["whole_codes"]

aten = torch.ops.aten


def whole_codes(gm: GraphModule) -> GraphModule:
    """Clamp real numbers right after a convolution, whose kernel does it; codes everywhere else."""
    write = Writer(gm, "whole_codes")
    for quantize in list(filter(is_quantize, gm.graph.nodes)):
        grid = Grid.of(quantize)
        if grid is None or grid.dtype not in (torch.uint8, torch.int8) or Grid.of_value(quantize.args[0]) == grid:
            continue
        held = torch.iinfo(grid.dtype)
        if grid.bounds == (held.min, held.max):
            continue
        whole, source = replace(grid, quant_min=held.min, quant_max=held.max), write(quantize.args[0])
        with write.before(quantize):
            if _is_convolution(source.node):
                low, high = ((code - grid.zero_point) * grid.scale for code in grid.bounds)
                clamped = call(aten.hardtanh.default, source, low, high)
                codes = call(quantize.target, clamped, *whole.arguments)
            else:
                codes = _clamped(call(quantize.target, source, *whole.arguments), grid, whole)
        write.replace(quantize, codes)
    return tidy(gm)


def _clamped(codes: Symbol, grid: Grid, whole: Grid) -> Symbol:
    """At the upper bound first: the other way round is hardtanh to Inductor, which it gives to the kernel once more."""
    if grid.quant_max < whole.quant_max:
        codes = call(aten.clamp_max.default, codes, grid.quant_max)
    return call(aten.clamp_min.default, codes, grid.quant_min) if grid.quant_min > whole.quant_min else codes


def _is_convolution(node: Node) -> bool:
    gemm = as_gemm(node)
    return gemm is not None and node.target in CONV and gemm.is_integer and len(node.users) == 1
