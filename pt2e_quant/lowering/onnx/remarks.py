"""What is worth knowing of a graph that onnxruntime runs, and is no fault of the file."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from ...graph.attributes import constant
from ..common.gemm import Gemm, Q, gemms
from ..common.program import Remark
from .runtime import EXACT_INPUTS

__all__ = ["remarks_on"]

_SEVEN_BITS = 64


def remarks_on(gm: GraphModule) -> list[Remark]:
    """Each at the first product that it is true of."""
    found: dict[str, Remark] = {}
    for gemm in gemms(gm):
        text = None if constant(gemm.weight.args[0]) is None else _text(gemm)
        if text is not None:
            found.setdefault(text, Remark(gemm.node.name, text))
    return list(found.values())


def _text(gemm: Gemm) -> str | None:
    if not gemm.is_integer or gemm.weight.target is Q.dequantize_per_channel_group.default:
        key, value = EXACT_INPUTS
        return f"here and below, onnxruntime rounds inputs to 8 bits in sessions that do not set {key} to {value}"
    if gemm.dynamic or torch.cpu._is_vnni_supported() or not _reaches_beyond_7_bits(gemm):
        return None
    return "here and below, this processor has no VNNI: sums of two products overflow 16 bits. Use reduce_range=True"


def _reaches_beyond_7_bits(gemm: Gemm) -> bool:
    integers = constant(gemm.weight.args[0])
    return integers is not None and bool((integers.short().abs() > _SEVEN_BITS).any())
