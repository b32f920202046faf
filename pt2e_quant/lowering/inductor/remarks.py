"""What is worth knowing of a graph that Inductor compiles, and breaks no contract."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node

from ...arguments import bind
from ...ops import LINEAR, is_dequantize
from ..common.gemm import as_gemm
from ..common.program import Remark
from .limits import WITHOUT_VNNI
from .passes.float32_between_integers import is_half

__all__ = ["overflows", "remarks_on"]


def remarks_on(gm: GraphModule) -> list[Remark]:
    """By kind: what this processor rounds otherwise, what rounds less, and what saves memory and no time."""
    return [Remark(node.name, text) for check in (overflows, _rounds_less, _saves_no_time) for node, text in check(gm)]


def overflows(gm: GraphModule) -> Iterator[tuple[Node, str]]:
    """This processor lacks VNNI, and an activation uses all 8 bits: see `exact_without_vnni`."""
    exact = (
        "this processor has no VNNI: its weight is multiplied in two halves. reduce_range=True saves the time for that"
    )
    saturates = (
        "this processor has no VNNI: in half precision, sums of two products overflow 16 bits. Use reduce_range=True"
    )
    for node in gm.graph.nodes if not torch.cpu._is_vnni_supported() else ():
        gemm = as_gemm(node)
        if gemm is not None and is_dequantize(gemm.activation) and bind(gemm.activation)["quant_max"] > WITHOUT_VNNI:
            yield node, saturates if is_half(node) else exact


def _rounds_less(gm: GraphModule) -> Iterator[tuple[Node, str]]:
    for node in gm.graph.nodes:
        gemm = as_gemm(node)
        if gemm is not None and is_dequantize(gemm.activation) and is_half(node):
            half = str(node.meta["val"].dtype).removeprefix("torch.")
            yield node, f"its kernel computes in float32, where the graph rounds to {half}"


def _saves_no_time(gm: GraphModule) -> Iterator[tuple[Node, str]]:
    for node in gm.graph.nodes:
        gemm = as_gemm(node)
        if gemm is None or node.target not in LINEAR or is_dequantize(gemm.activation):
            continue
        dtype = str(gemm.weight.meta["val"].dtype).removeprefix("torch.")
        if dtype != "bfloat16":
            yield node, f"its weight becomes {dtype} in every run, so it saves memory and no time; bfloat16 has kernels"
