"""What is worth knowing of a graph that Inductor compiles, and breaks no contract."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node

from ...arguments import bind
from ...graph.halves import is_half
from ...ops import LINEAR
from ..common.gemm import gemms
from ..common.program import Remark
from .limits import WITHOUT_VNNI

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
    for gemm in gemms(gm) if not torch.cpu._is_vnni_supported() else ():
        if gemm.is_integer and bind(gemm.activation)["quant_max"] > WITHOUT_VNNI:
            yield gemm.node, saturates if is_half(gemm.node) else exact


def _rounds_less(gm: GraphModule) -> Iterator[tuple[Node, str]]:
    for gemm in gemms(gm):
        if gemm.is_integer and is_half(gemm.node):
            half = str(gemm.node.meta["val"].dtype).removeprefix("torch.")
            yield gemm.node, f"its kernel computes in float32, where the graph rounds to {half}"


def _saves_no_time(gm: GraphModule) -> Iterator[tuple[Node, str]]:
    for gemm in gemms(gm):
        dtype = str(gemm.weight.meta["val"].dtype).removeprefix("torch.")
        if gemm.node.target in LINEAR and not gemm.is_integer and dtype != "bfloat16":
            text = f"its weight becomes {dtype} in every run, so it saves memory and no time; bfloat16 has kernels"
            yield gemm.node, text
