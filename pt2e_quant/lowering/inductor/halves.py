"""Models in bfloat16 or float16, for Inductor: float32 between the integers.

An integer kernel adds up in int32 and scales in float32, whatever the model computes in. Inductor's patterns look for
float32 there; those that it has for bfloat16 want casts that no converted graph holds. And a dequantize to bfloat16
they take for one to float32: what follows would read numbers of the wrong width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ...graph.attributes import constant, free_name, insert_attribute
from ...graph.module import tidy
from ...graph.values import with_value
from ...graph.write import emit
from ...ops import ADD, HARDTANH, RELU, RELU6, is_dequantize, is_quantize
from ..common.gemm import as_gemm

__all__ = ["cast_float16", "float32_between_integers", "remarks_on_rounding"]

aten = torch.ops.aten
_HALVES = (torch.bfloat16, torch.float16)
_FUSED = frozenset(
    (*RELU, *RELU6, *HARDTANH, *ADD, aten.hardswish.default, aten.silu.default, aten.gelu.default)
)  # fmt: skip


def float32_between_integers(gm: GraphModule) -> GraphModule:
    """Compute in float32 from the integers that a product reads to the end of its kernel, and cast what leaves it."""
    names = free_name(gm, "_float32_")
    for node in list(gm.graph.nodes):
        gemm = as_gemm(node)
        if gemm is None or not is_dequantize(gemm.activation) or not _is_half(node):
            continue
        half = node.meta["val"].dtype
        kernel = _kernel(node)
        for part in kernel:
            for source in part.all_input_nodes:
                if source not in kernel and _is_half(source):
                    _feed(part, source, names)
            _widen(part)
        _leave(kernel[-1], half)
    return tidy(gm)


def cast_float16(gm: GraphModule) -> GraphModule:
    """Casts of their own around quantize and dequantize, of which Inductor has none for float16. For the end."""
    for node in list(gm.graph.nodes):
        if is_quantize(node) and (source := node.all_input_nodes[0]).meta["val"].dtype is torch.float16:
            with gm.graph.inserting_before(node):
                node.replace_input_with(source, emit(source, "lowering", aten.to.dtype, source, torch.float32))
        elif is_dequantize(node) and node.kwargs.get("out_dtype") is torch.float16:
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "out_dtype"}
            _widen(node)
            _leave(node, torch.float16)
    return tidy(gm)


def remarks_on_rounding(gm: GraphModule) -> Iterator[tuple[Node, str]]:
    """Which operators round less than the converted graph does."""
    for node in gm.graph.nodes:
        gemm = as_gemm(node)
        if gemm is not None and is_dequantize(gemm.activation) and _is_half(node):
            half = str(node.meta["val"].dtype).removeprefix("torch.")
            yield node, f"its kernel computes in float32, where the graph rounds to {half}"


def _is_half(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype in _HALVES


def _kernel(node: Node) -> list[Node]:
    """The product and the elementwise ops after it that may become one kernel, in order."""
    nodes = [node]
    while len(node.users) == 1:
        (node,) = node.users
        if node.target not in _FUSED or not _is_half(node):
            break
        nodes.append(node)
    return nodes


def _feed(part: Node, source: Node, names: Iterator[str]) -> None:
    """Give a part of the kernel this operand in float32."""
    gm = part.graph.owning_module
    if "out_dtype" in source.kwargs and is_dequantize(source) and len(source.users) == 1:
        source.kwargs = {key: value for key, value in source.kwargs.items() if key != "out_dtype"}
        _widen(source)
        return
    values = constant(source)
    with part.graph.inserting_before(part):
        if values is not None and gm is not None:
            wide = insert_attribute(gm, next(names), values.detach().float(), like=source, by="lowering")
        else:
            wide = emit(source, "lowering", aten.to.dtype, source, torch.float32)
    part.replace_input_with(source, wide)


def _widen(node: Node) -> None:
    value = node.meta["val"]
    with_value(node, node, lambda: value.to(torch.float32))


def _leave(last: Node, half: torch.dtype) -> None:
    """Cast for those who read the kernel's result in the dtype of the model; a quantize takes float32."""
    readers = [user for user in last.users if not is_quantize(user)]
    casts = [user for user in readers if user.target is aten.to.dtype and user.args[1] is torch.float32]
    for cast in casts:  # before another kernel
        cast.replace_all_uses_with(last)
    readers = [user for user in readers if user not in casts]
    if not readers:
        return
    with last.graph.inserting_after(last):
        narrow = emit(last, "lowering", aten.to.dtype, last, half)
    for user in readers:
        user.replace_input_with(last, narrow)
