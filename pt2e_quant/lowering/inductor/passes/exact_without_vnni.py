"""Multiply by two halves of a weight on processors without VNNI, so that the sum of two products fits 16 bits.

There, oneDNN adds neighbouring products of 8 bits in 16, and saturates: 255 * 127 * 2 is too large, 255 * 64 * 2 is
not. A weight is the sum of two that reach 64, so a product over the input twice is exact. It takes twice the time;
activations of 7 bits (reduce_range) do without.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from ....arguments import bind
from ....graph.attributes import constant, free_name, insert_attribute
from ....graph.module import tidy
from ....graph.write import Symbol, Writer, call
from ...common.gemm import Gemm, Q, gemms
from ..limits import WITHOUT_VNNI

__all__ = ["exact_without_vnni"]

_CAT = torch.ops.aten.cat.default
_REACH = 64


def exact_without_vnni(gm: GraphModule) -> GraphModule:
    """w becomes [w // 2, w - w // 2] along its inputs, x becomes [x, x]."""
    if torch.cpu._is_vnni_supported():
        return gm
    name = "exact_without_vnni"
    write, halves = Writer(gm, name), free_name(gm, "_halves_")
    for gemm in gemms(gm):
        weight = constant(gemm.weight.args[0])
        if weight is None or not _overflows(gemm, weight):
            continue
        half = weight >> 1
        both = torch.cat([half, weight - half], 1)
        with write.before(gemm.weight):  # for each product one of its own, see `own_weights`
            gemm.weight.update_arg(0, insert_attribute(gm, next(halves), both, like=gemm.weight, by=name))
        with write.before(gemm.activation):
            gemm.activation.update_arg(0, _twice(write(gemm.activation.args[0]), bind(gemm.node).get("groups")).node)
    return tidy(gm)


def _overflows(gemm: Gemm, weight: torch.Tensor) -> bool:
    if gemm.node.meta["val"].dtype is not torch.float32:  # in half precision, Inductor's patterns miss such a product
        return False
    if not gemm.is_integer or gemm.weight.target is not Q.dequantize_per_channel.default:
        return False
    return bind(gemm.activation)["quant_max"] > WITHOUT_VNNI and bool((weight.short().abs() > _REACH).any())


def _twice(codes: Symbol, groups: int | None) -> Symbol:
    """Features, or the channels of each group."""
    if groups is None:
        return call(_CAT, [codes, codes], -1)  # type: ignore[no-any-return]
    if groups == 1:
        return call(_CAT, [codes, codes], 1)  # type: ignore[no-any-return]
    parts = call(torch.ops.aten.unflatten.int, codes, 1, [groups, -1])
    return call(_CAT, [parts, parts], 2).flatten(1, 2)  # type: ignore[no-any-return]
