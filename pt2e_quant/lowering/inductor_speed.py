"""Passes that keep every value and take time out of what Inductor compiles; docs/x86.md has what each one brings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..arguments import bind
from ..graph import copy_origin, free_name, insert_attribute, tidy
from ..ops import ADD, HARDTANH, RELU, RELU6
from .xnnpack_patterns import Gemm, as_gemm, constant, is_call, is_quantize

__all__ = ["absorb_clamps", "pointwise_as_linear"]

aten = torch.ops.aten
Q = torch.ops.quantized_decomposed

_CLAMPS = (*RELU, *RELU6, *HARDTANH)


def absorb_clamps(gm: GraphModule) -> GraphModule:
    """Drop relu, relu6 and hardtanh before a quantize that saturates at or within their bounds."""
    for quantize in gm.graph.find_nodes(op="call_function", target=Q.quantize_per_tensor.default):
        clamp = quantize.args[0]
        if not is_call(clamp) or clamp.target not in _CLAMPS or len(clamp.users) != 1:
            continue
        codes = Q.quantize_per_tensor.default(torch.tensor(_bounds(clamp)), *quantize.args[1:])
        if codes.tolist() == list(quantize.args[3:5]):
            clamp.replace_all_uses_with(clamp.args[0])
    return tidy(gm)


def _bounds(clamp: Node) -> tuple[float, float]:
    if clamp.target in HARDTANH:
        bound = bind(clamp)
        return float(bound["min_val"]), float(bound["max_val"])
    return 0.0, 6.0 if clamp.target in RELU6 else torch.finfo(torch.float32).max


def pointwise_as_linear(gm: GraphModule) -> GraphModule:
    """Compute a convolution of kernel size 1 as a linear over its pixels, which Inductor can tune its own kernels for.

    Only where nothing but relu lies between it and its quantize, since linear kernels fuse no more than that, and
    where no sum reads the result: convolutions add into the memory of the other operand, and take no view for that.
    """
    names = free_name(gm, "_pixels_")
    for node in list(gm.graph.nodes):
        gemm = as_gemm(node)
        if gemm is None or node.target is not aten.conv2d.default or not _is_pointwise(gemm):
            continue
        quantize = _quantize_behind(node)
        weight, values = gemm.weight.args[0], constant(gemm.weight.args[0])
        if quantize is None or values is None:
            continue
        with gm.graph.inserting_before(gemm.weight):
            flat = insert_attribute(gm, next(names), values.flatten(1), like=gemm.weight, by="lowering")
        gemm.weight.replace_input_with(weight, flat)  # type: ignore[arg-type]
        codes = gemm.activation.args[0]
        with gm.graph.inserting_before(gemm.activation):
            last = _call(node, aten.contiguous.default, _call(node, aten.permute.default, codes, [0, 2, 3, 1]))
        gemm.activation.replace_input_with(codes, last)  # type: ignore[arg-type]
        node.target, node.args, node.kwargs = aten.linear.default, (gemm.activation, gemm.weight, gemm.bias), {}
        users = list(quantize.users)
        with gm.graph.inserting_after(quantize):
            first = _call(node, aten.permute.default, quantize, [0, 3, 1, 2])
        for user in users:
            user.replace_input_with(quantize, first)
    return tidy(gm)


def _is_pointwise(gemm: Gemm) -> bool:
    bound, value = bind(gemm.node), gemm.activation.meta.get("val")
    if gemm.activation.target is not Q.dequantize_per_tensor.default or not isinstance(value, Tensor):
        return False
    sizes = gemm.weight.meta["val"].shape[2:]
    plain = [list(bound[name]) for name in ("stride", "padding")]
    return value.dim() == 4 and [*sizes] == [1, 1] and bound["groups"] == 1 and plain == [[1, 1], [0, 0]]


def _quantize_behind(node: Node) -> Node | None:
    """The quantize of the output, none where something else reads the result, or a sum what is read from it."""
    users = list(node.users)
    if len(users) == 1 and users[0].target in RELU:
        users = list(users[0].users)
    if len(users) != 1 or not is_quantize(users[0]):
        return None
    added = any(user.target in ADD for reader in users[0].users for user in reader.users)
    return None if added else users[0]


def _call(like: Node, target: Any, *args: object) -> Node:
    return copy_origin(like.graph.call_function(target, args), like, "lowering")  # type: ignore[arg-type]
