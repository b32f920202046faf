"""Passes that keep every value and take time out of what Inductor compiles; docs/x86.md has what each one brings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ...arguments import bind
from ...graph.attributes import constant, free_name, insert_attribute
from ...graph.module import tidy
from ...meta import MERGED_KEY
from ...ops import ADD, HARDTANH, LINEAR, RELU, RELU6, is_call, is_dequantize, is_quantize, op_name
from ...where import copy_origin
from ..common.entry import origin
from ..common.gemm import Gemm, as_gemm
from ..executorch.xnnpack.patterns import moves_values

__all__ = ["absorb_clamps", "merge_linears", "narrow_qparams", "pointwise_as_linear", "store_qparams"]

aten = torch.ops.aten


Q = torch.ops.quantized_decomposed


_FUSED = frozenset(("relu", "gelu", "add"))  # what oneDNN's linear also computes


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
        quantize = _quantize_after(node)
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
    read = gemm.node.args[0]  # not padded on the way
    if getattr(read, "target", None) is not Q.dequantize_per_tensor.default or not isinstance(value, Tensor):
        return False
    sizes = gemm.weight.meta["val"].shape[2:]
    plain = [list(bound[name]) for name in ("stride", "padding")]
    return value.dim() == 4 and [*sizes] == [1, 1] and bound["groups"] == 1 and plain == [[1, 1], [0, 0]]


def _quantize_after(node: Node) -> Node | None:
    """The quantize of the output, none where something else reads the result, or a sum what is read from it."""
    users = list(node.users)
    if len(users) == 1 and users[0].target in RELU:
        users = list(users[0].users)
    if len(users) != 1 or not is_quantize(users[0]):
        return None
    added = any(user.target in ADD for reader in users[0].users for user in reader.users)
    return None if added else users[0]


def merge_linears(gm: GraphModule) -> GraphModule:
    """Compute linears that read the same integers, as query, key and value do, by one with all of their outputs.

    Weights have a scale for each output, so no value changes. One call on a wide weight takes less time than several.
    meta[MERGED_KEY] of the linear lists them by the names that they have in the converted graph.
    """
    groups: dict[Any, list[Gemm]] = defaultdict(list)
    for node in gm.graph.nodes:
        gemm = as_gemm(node)
        if gemm is not None and _can_merge(gemm):
            read = gemm.activation
            groups[read.target, read.args, tuple(read.kwargs.items()), gemm.bias is None].append(gemm)
    names = free_name(gm, "_merged_")
    for group in groups.values():
        if len(group) > 1:
            _merge(gm, group, names)
    return tidy(gm)


def _can_merge(gemm: Gemm) -> bool:
    """False where a kernel computes more than the product, and where the layout of the result can be seen outside."""
    if gemm.node.target not in LINEAR or not is_dequantize(gemm.activation):
        return False
    stored = gemm.weight.target is Q.dequantize_per_channel.default and len(gemm.weight.all_input_nodes[0].users) == 1
    if not stored or any(constant(source) is None for source in (*gemm.weight.all_input_nodes, gemm.bias) if source):
        return False
    ends = [user for node in (gemm.node, *_views(gemm.node)) for user in node.users if user.op == "output"]
    return not ends and not any(is_quantize(user) or op_name(user) in _FUSED for user in gemm.node.users)


def _views(node: Node) -> Iterator[Node]:
    """What only moves the values of a node, and of its views."""
    for user in node.users:
        if is_call(user) and moves_values(user):
            yield user
            yield from _views(user)


def _merge(gm: GraphModule, group: list[Gemm], names: Iterator[str]) -> None:
    first = group[0]

    def stacked(*parts: Node) -> Node:
        value = torch.cat([constant(part) for part in parts]).detach()  # type: ignore[misc]  # _can_merge asked
        return insert_attribute(gm, next(names), value, like=parts[0], by="lowering")

    with gm.graph.inserting_before(first.node):
        codes = [stacked(*parts) for parts in zip(*(gemm.weight.all_input_nodes for gemm in group), strict=True)]
        weight = _call(first.weight, Q.dequantize_per_channel.default, *codes, *first.weight.args[len(codes) :])
        bias = None if first.bias is None else stacked(*(gemm.bias for gemm in group if gemm.bias))
        merged = _call(first.node, aten.linear.default, first.activation, weight, bias)
        merged.meta[MERGED_KEY] = tuple(origin(gemm.node) for gemm in group)
        start = 0
        for gemm in group:
            end = start + len(constant(gemm.weight.all_input_nodes[0]))  # type: ignore[arg-type]
            part = _call(gemm.node, aten.slice.Tensor, merged, -1, start, end)
            start = end
            for view in _views(gemm.node):
                if view.target is aten.view.default:  # of rows that no longer touch
                    view.target = aten.reshape.default
            gemm.node.replace_all_uses_with(part)


def store_qparams(graph: Graph) -> None:
    """Store qparams that are computed at run time before a loop quantizes with them. For Inductor's own graph.

    Inductor would write their computation, three divisions, into the loop, for every sixteen values. It stores what
    as_strided reads.
    """
    for quantize in graph.find_nodes(op="call_function", target=Q.quantize_per_tensor.tensor):
        for position in (1, 2):
            chosen = quantize.args[position]
            value = chosen.meta["val"]
            with graph.inserting_before(quantize):
                stored = graph.call_function(aten.as_strided.default, (chosen, [*value.shape], [*value.stride()]))
            stored.meta.update(chosen.meta)
            quantize.update_arg(position, stored)


def narrow_qparams(graph: Graph) -> None:
    """Give linears the scale that is computed at run time as float32, and its zero point as int32.

    For Inductor's own graph, when it tunes: with float64 and int64, as choose_qparams returns them, the templates of
    2.13 damage the heap, which ends the process.
    """
    for linear in list(graph.nodes):
        if getattr(linear.target, "__name__", "") not in ("qlinear", "qlinear_binary"):
            continue
        for name, dtype in (("x_scale", torch.float32), ("x_zp", torch.int32)):
            chosen = linear.kwargs[name]
            if not isinstance(chosen, Node):
                continue
            with graph.inserting_before(linear):
                narrow = graph.call_function(torch.ops.prims.convert_element_type.default, (chosen, dtype))
            narrow.meta.update(chosen.meta, val=chosen.meta["val"].to(dtype))
            linear.update_kwarg(name, narrow)


def _call(like: Node, target: Any, *args: object) -> Node:
    return copy_origin(like.graph.call_function(target, args), like, "lowering")  # type: ignore[arg-type]
