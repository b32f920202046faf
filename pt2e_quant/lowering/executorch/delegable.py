"""Rewrites for XNNPACK: float operators that it has no kernel for, spelled with those that it has.

An operator that stays outside cuts the delegate in two, which costs more than the operator itself. Every rewrite keeps
the value up to float32 rounding; `cleanup` before and after it changes none at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ...arguments import bind
from ...graph.attributes import attribute, constant, free_name, insert_attribute
from ...graph.module import tidy
from ...graph.write import emit
from ...ops import CAT, LINEAR, MUL, is_call, is_dequantize, is_value_preserving, op_name
from ...passes.decompose_attention import decompose_attention
from ..common.gemm import Q
from .delegable_attention import attention_on_merged_heads, moves_stay_with_their_reshapes

__all__ = [
    "DELEGABLE_PASSES",
    "copies_to_concatenate",
    "expands_to_products",
    "fold_factors_into_linears",
    "means_to_linears",
    "norms_to_linears",
    "slices_to_linears",
    "weighted_sums_to_products",
]

aten = torch.ops.aten
_BY = "lowering"


def norms_to_linears(gm: GraphModule) -> GraphModule:
    """Write layer_norm and rms_norm over the last dimension as means, differences and products."""
    means = _Means(gm)
    for node in list(gm.graph.nodes):
        if not is_call(node) or op_name(node) not in ("layer_norm", "rms_norm"):
            continue
        bound = bind(node)
        x = bound["input"]
        if len(bound["normalized_shape"]) != 1 or not means.can(x):
            continue
        with gm.graph.inserting_before(node):
            centered = x
            if op_name(node) == "layer_norm":
                centered = emit(node, _BY, aten.sub.Tensor, x, means.of(node, x))
            squares = means.of(node, emit(node, _BY, aten.mul.Tensor, centered, centered))
            eps = torch.finfo(torch.float32).eps if bound["eps"] is None else bound["eps"]
            factor = emit(node, _BY, aten.rsqrt.default, emit(node, _BY, aten.add.Tensor, squares, eps))
            value = emit(node, _BY, aten.mul.Tensor, centered, factor)
            if bound["weight"] is not None:
                value = emit(node, _BY, aten.mul.Tensor, value, bound["weight"])
            if bound.get("bias") is not None:
                value = emit(node, _BY, aten.add.Tensor, value, bound["bias"])
        _take_the_place(node, value)
    return tidy(gm)


def means_to_linears(gm: GraphModule) -> GraphModule:
    """Write the mean over the last dimension as a linear by 1/n: XNNPACK averages over height and width only."""
    means = _Means(gm)
    for node in gm.graph.find_nodes(op="call_function", target=aten.mean.dim):
        bound = bind(node)
        x, dims = bound["self"], bound["dim"]
        if not means.can(x) or dims is None or bound["dtype"] is not None:
            continue
        rank = x.meta["val"].dim()
        if [dim % rank for dim in dims] != [rank - 1]:
            continue
        with gm.graph.inserting_before(node):
            value = means.of(node, x)
            if not bound["keepdim"]:
                value = emit(node, _BY, aten.squeeze.dim, value, -1)
        _take_the_place(node, value)
    return tidy(gm)


class _Means:
    """Means over the last dimension as linears; one weight for each width."""

    def __init__(self, gm: GraphModule) -> None:
        self._gm = gm
        self._names = free_name(gm, "_mean_weight_")
        self._targets: dict[int, str] = {}

    def can(self, x: object) -> bool:
        return isinstance(x, Node) and _is_float32(x) and isinstance(x.meta["val"].shape[-1], int)

    def of(self, node: Node, x: Node) -> Node:
        width = int(x.meta["val"].shape[-1])
        if width not in self._targets:
            self._targets[width] = next(self._names)
        value = nn.Parameter(torch.full((1, width), 1 / width), requires_grad=False)
        weight = insert_attribute(self._gm, self._targets[width], value, like=node, by=_BY)
        return emit(node, _BY, aten.linear.default, x, weight)


def weighted_sums_to_products(gm: GraphModule) -> GraphModule:
    """Write (x * w).sum(1), with one weight for each row as in the mean over unmasked tokens, as a bmm of both."""
    for node in gm.graph.find_nodes(op="call_function", target=aten.sum.dim_IntList):
        bound = bind(node)
        product = bound["self"]
        if bound["dtype"] is not None or product.target not in MUL or not _is_float32(product):
            continue
        if product.meta["val"].dim() != 3 or [dim % 3 for dim in bound["dim"] or ()] != [1]:
            continue
        rows = [factor for factor in product.all_input_nodes if _is_row_weight(factor, product)]
        others = [factor for factor in product.all_input_nodes if factor not in rows]
        if len(rows) != 1 or len(others) != 1 or _shape(others[0]) != _shape(product):
            continue
        with gm.graph.inserting_before(node):
            value = emit(node, _BY, aten.transpose.int, _narrow(rows[0]), 1, 2)
            value = emit(node, _BY, aten.bmm.default, value, others[0])
            if not bound["keepdim"]:
                value = emit(node, _BY, aten.squeeze.dim, value, 1)
        _take_the_place(node, value)
    return tidy(gm)


def _is_row_weight(factor: Node, product: Node) -> bool:
    return _is_float32(factor) and _shape(_narrow(factor)) == [*_shape(product)[:2], "1"]


def _narrow(factor: Node) -> Node:
    """The tensor before it was expanded."""
    return factor.all_input_nodes[0] if factor.target is aten.expand.default else factor


def expands_to_products(gm: GraphModule) -> GraphModule:
    """Write expand to fixed sizes as a product by ones: key and value heads that several query heads share."""
    names = free_name(gm, "_ones_")
    for node in gm.graph.find_nodes(op="call_function", target=aten.expand.default):
        x = node.all_input_nodes[0]
        if not _is_float32(node) or _comes_from_integers(x):
            continue
        old, new = list(x.meta["val"].shape), list(node.meta["val"].shape)
        old = [1] * (len(new) - len(old)) + old
        factors = [b if a == 1 else 1 for a, b in zip(old, new, strict=True)]
        if sum(not isinstance(size, int) for size in new) > 1:
            continue  # the reshapes around it stay outside, and so does it
        if all(isinstance(factor, int) for factor in factors) and math.prod(factors) > 1:
            with gm.graph.inserting_before(node):
                ones = insert_attribute(gm, next(names), torch.ones(factors), like=node, by=_BY)
                value = emit(node, _BY, aten.mul.Tensor, x, ones)
            _take_the_place(node, value)
    return tidy(gm)


def _comes_from_integers(node: Node) -> bool:
    """Made outside of any delegate, from integers or booleans: expanding it there costs nothing more."""
    return not any(_is_float(source) for source in node.all_input_nodes)


def copies_to_concatenate(gm: GraphModule) -> GraphModule:
    """Give a cat that reads one tensor only, as rotary embeddings do, a second: XNNPACK counts different tensors."""
    for node in gm.graph.nodes:
        parts: Any = node.args[0] if node.target in CAT else ()
        if len(parts) < 2 or len(set(parts)) > 1 or not _is_float32(node) or is_dequantize(parts[0]):
            continue
        with gm.graph.inserting_before(node):
            copy = emit(node, _BY, aten.mul.Tensor, parts[0], 1.0)
        node.args = ([copy, *parts[1:]], *node.args[1:])
    return tidy(gm)


def slices_to_linears(gm: GraphModule) -> GraphModule:
    """Write slices of the last dimension, where other dimensions are dynamic, as a linear that picks columns.

    XNNPACK slices tensors of fixed shape only. Rotary embeddings take halves of each head, unrolled RNNs their gates.
    Sums of one value and zeros are exact, as long as all values are finite.
    """
    names = free_name(gm, "_columns_")
    targets: dict[tuple[int, ...], str] = {}
    for node in gm.graph.find_nodes(op="call_function", target=aten.slice.Tensor):
        bound = bind(node)
        x, key = node.all_input_nodes[0], _columns(node)
        if key is None or not _is_float32(x) or _comes_from_integers(x):
            continue
        width, start, end, step = key
        if key not in targets:
            targets[key] = next(names)
        value = nn.Parameter(torch.eye(width)[start:end:step].contiguous(), requires_grad=False)
        with gm.graph.inserting_before(node):
            weight = insert_attribute(gm, targets[key], value, like=node, by=_BY)
            picked = emit(node, _BY, aten.linear.default, bound["self"], weight)
        _take_the_place(node, picked)
    return tidy(gm)


def _columns(node: Node) -> tuple[int, int, int, int] | None:
    """(width, start, end, step) of a slice of the last dimension, alone of fixed size; None for other slices."""
    bound, sizes = bind(node), _literal(node.all_input_nodes[0])
    limits = [0 if bound["start"] is None else bound["start"], sizes[-1] if bound["end"] is None else bound["end"]]
    inner = bound["dim"] % len(sizes) == len(sizes) - 1 and sizes[-1] > 0 and -1 in sizes
    if not inner or not all(isinstance(limit, int) for limit in limits):
        return None
    return sizes[-1], *slice(*limits).indices(sizes[-1])[:2], bound["step"]


def fold_factors_into_linears(gm: GraphModule) -> GraphModule:
    """Multiply the weight's scale and the bias of a linear instead of its output, or of a product that it enters.

    c * (q @ k) with q = linear(x), as in attention, is (c * q) @ k; in between, values may be moved but not read.
    """
    names = free_name(gm, "_scaled_")
    for node in list(gm.graph.nodes):
        factor = _factor(node)
        if factor is None:
            continue
        linear = _linear_before(node.all_input_nodes[0])
        if linear is not None and _scale(gm, linear, factor, names):
            node.replace_all_uses_with(node.all_input_nodes[0])
            gm.graph.erase_node(node)
    return tidy(gm)


def _factor(node: Node) -> float | None:
    """c of x * c with a number or a constant of one element."""
    if not is_call(node) or not _is_float32(node) or node.target not in (*MUL, aten.mul.Scalar, aten.div.Tensor):
        return None
    x, other = node.args[:2]
    number: Any = other
    if isinstance(other, Node):
        value = constant(other)
        number = float(value) if value is not None and value.numel() == 1 and value.dim() == 0 else None
    if not isinstance(x, Node) or not isinstance(number, (int, float)) or not number > 0:
        return None
    return 1 / number if node.target is aten.div.Tensor else float(number)


def _linear_before(value: Node) -> Node | None:
    """The linear whose output this is, moved or multiplied from the right on the way and read by nobody else."""
    while is_call(value) and len(value.users) == 1:
        if value.target in LINEAR:
            return value
        product = value.target in (aten.matmul.default, aten.bmm.default)
        if not product and not is_value_preserving(value):
            return None
        value = value.args[0]  # type: ignore[assignment]
    return None


def _scale(gm: GraphModule, linear: Node, factor: float, names: Any) -> bool:
    """Scale the parameters of a linear; False when they are not stored ones of their own."""
    bound = bind(linear)
    weight, bias = bound["weight"], bound["bias"]
    stored = weight
    if is_dequantize(weight):
        if weight.target not in (Q.dequantize_per_channel.default, Q.dequantize_per_channel_group.default):
            return False
        stored = weight.args[1]
    parameters = [one for one in (stored, bias) if one is not None]
    if any(constant(one) is None for one in parameters) or len(weight.users) > 1:
        return False
    with gm.graph.inserting_before(weight if is_dequantize(weight) else linear):
        for parameter, reader in zip(parameters, (weight if is_dequantize(weight) else linear, linear), strict=False):
            value = attribute(gm, str(parameter.target)).detach() * factor
            kept = nn.Parameter(value, requires_grad=False) if not is_dequantize(reader) else value
            new = insert_attribute(gm, next(names), kept, like=parameter, by=_BY)
            reader.replace_input_with(parameter, new)
    return True


def _literal(tensor: Node) -> list[int]:
    return [size if isinstance(size, int) else -1 for size in tensor.meta["val"].shape]


def _take_the_place(old: Node, new: Node) -> None:
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def _shape(node: Node) -> list[str]:
    return [str(size) for size in node.meta["val"].shape]


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype.is_floating_point


def _is_float32(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype is torch.float32


DELEGABLE_PASSES: tuple[Callable[[GraphModule], GraphModule], ...] = (
    decompose_attention, norms_to_linears, means_to_linears, weighted_sums_to_products, expands_to_products,
    slices_to_linears, copies_to_concatenate, fold_factors_into_linears, attention_on_merged_heads,
    moves_stay_with_their_reshapes,
)  # fmt: skip
"""In this order, before `cleanup.XNNPACK_PASSES`."""
