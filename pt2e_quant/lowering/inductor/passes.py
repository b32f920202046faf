"""Passes on a converted graph before Inductor compiles it: integers where it would compute, float where it would not.

They edit a private copy, after the clean-up that every lowering does. Only `drop_unread_rounding` changes values, and
it says so. Inductor's own passes then find the patterns of its integer kernels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ...arguments import bind, set_argument
from ...graph.attributes import constant, free_name, insert_attribute
from ...graph.module import tidy
from ...grid import Grid
from ...meta import DROPPED_KEY
from ...ops import (
    ADD,
    CAT,
    CONV,
    HARDTANH,
    LINEAR,
    MAX_POOL,
    PAD,
    RELU,
    RELU6,
    is_call,
    is_dequantize,
    is_quantize,
    op_name,
)
from ...where import copy_origin
from ..common.entry import origin
from ..common.gemm import Q, as_gemm
from .halves import cast_float16, float32_between_integers
from .weights import integer_weights

__all__ = [
    "INDUCTOR_PASSES",
    "contiguous_rows",
    "conv1d_as_conv2d",
    "drop_unread_rounding",
    "keep_inputs",
    "move_integers",
    "own_dequantizes",
    "own_weights",
    "second_channel",
]

aten = torch.ops.aten


_SHAPES = "view reshape _unsafe_view flatten unflatten ravel unsqueeze squeeze"


_ORDERS = "permute transpose t swapaxes swapdims movedim moveaxis numpy_T mT"


_PARTS = "slice narrow select channel_shuffle pixel_shuffle pixel_unshuffle"


_MOVES = frozenset(f"{_SHAPES} {_ORDERS} {_PARTS}".split())


_IN_TWO_DIMENSIONS: dict[Any, Any] = {
    aten.conv1d.default: aten.conv2d.default,
    aten.conv1d.padding: aten.conv2d.padding,
}


_ELEMENTWISE = frozenset((*RELU, *RELU6, *HARDTANH, aten.hardswish.default, aten.silu.default))


def move_integers(gm: GraphModule) -> GraphModule:
    """Let ops that only move values move the integers: quantize(move(dequantize(q, p)), p) is move(q).

    Inductor would compute the real numbers and round them again, for every element. Padded zeros become zero points.
    """
    for quantize in gm.graph.find_nodes(op="call_function", target=Q.quantize_per_tensor.default):
        move = quantize.args[0]
        if not is_call(move) or len(move.users) != 1:
            continue
        sources = [node for node in move.all_input_nodes if _is_tensor(node)] if _moves(move) else []
        grid = Grid.of(quantize)
        per_tensor = [s for s in sources if grid and is_dequantize(s) and Grid.of(s) == grid]
        if not sources or len(per_tensor) != len(sources):
            continue
        for source in sources:
            move.replace_input_with(source, source.args[0])
        if move.target in PAD:
            set_argument(move, "value", grid.zero_point)  # type: ignore[union-attr]
        move.meta["val"] = quantize.meta.get("val")
        quantize.replace_all_uses_with(move)
        gm.graph.erase_node(quantize)
    return tidy(gm)


def _is_tensor(node: Node) -> bool:
    """False for the sizes that a reshape of dynamic shapes reads."""
    return isinstance(node.meta.get("val"), Tensor)


def _moves(node: Node) -> bool:
    if node.target in PAD:
        bound = bind(node)
        return bound.get("mode", "constant") == "constant" and not bound["value"]
    return node.target in CAT or op_name(node) in _MOVES


def own_dequantizes(gm: GraphModule) -> GraphModule:
    """Give every reader a dequantize of its own, as convert_pt2e does: the next passes change it for one reader."""
    for node in list(filter(is_dequantize, gm.graph.nodes)):
        for user in list(node.users)[1:]:
            with gm.graph.inserting_before(user):
                user.replace_input_with(node, gm.graph.node_copy(node, lambda source: source))
    return gm


def contiguous_rows(gm: GraphModule) -> GraphModule:
    """Copy the integers that a linear reads out of order, when its input has more than two dimensions.

    Such a linear becomes a bmm of expanded tensors, whose pattern Inductor finds for static sizes only.
    """
    for node in gm.graph.nodes:
        gemm = as_gemm(node)
        if gemm is None or node.target not in LINEAR or not is_dequantize(gemm.activation):
            continue
        value = gemm.activation.meta.get("val")
        if value is None or value.dim() <= 2 or value.is_contiguous():
            continue
        codes = gemm.activation.args[0]
        with gm.graph.inserting_before(gemm.activation):
            copied = gm.graph.call_function(aten.clone.default, (codes,), {"memory_format": torch.contiguous_format})
        copy_origin(copied, node, "lowering")
        gemm.activation.replace_input_with(codes, copied)  # type: ignore[arg-type]
    return gm


def conv1d_as_conv2d(gm: GraphModule) -> GraphModule:
    """Compute a convolution in one dimension as one of height 1: Inductor 2.13 infers a wrong length for the former."""
    names = free_name(gm, "_height_one_")
    for node in list(gm.graph.nodes):
        gemm = as_gemm(node)
        if gemm is None or node.target not in _IN_TWO_DIMENSIONS or not is_dequantize(node.args[0]):
            continue  # a padding in front is left for the account to tell
        weight, codes = gemm.weight.args[0], gemm.activation.args[0]
        values, bound = constant(weight), bind(node)
        if values is None:
            continue
        with gm.graph.inserting_before(gemm.weight):
            wide = insert_attribute(gm, next(names), values.unsqueeze(2), like=gemm.weight, by="lowering")
        with gm.graph.inserting_before(gemm.activation):
            high = _call(node, aten.unsqueeze.default, codes, 2)
        gemm.weight.replace_input_with(weight, wide)  # type: ignore[arg-type]
        gemm.activation.replace_input_with(codes, high)  # type: ignore[arg-type]
        padding = bound["padding"] if isinstance(bound["padding"], str) else [0, *bound["padding"]]
        steps = [1, *bound["stride"]], padding, [1, *bound["dilation"]], bound["groups"]
        node.target = _IN_TWO_DIMENSIONS[node.target]
        node.args, node.kwargs = (gemm.activation, gemm.weight, bound["bias"], *steps), {}
        _squeeze_after(_end_of_kernel(node))
    return tidy(gm)


def _end_of_kernel(node: Node) -> Node:
    """The last of the elementwise ops, up to and with a quantize, that one kernel computes from here."""
    while len(node.users) == 1 and not is_quantize(node):
        (user,) = node.users
        if not (is_quantize(user) or user.target in _ELEMENTWISE):
            break
        node = user
    return node


def _squeeze_after(node: Node) -> None:
    users = list(node.users)
    with node.graph.inserting_after(node):
        low = _call(node, aten.squeeze.dim, node, 2)
    for user in users:
        user.replace_input_with(node, low)


def second_channel(gm: GraphModule) -> GraphModule:
    """Give a convolution of one channel a second one of zeros, where sizes are dynamic.

    The layout of one channel can be read both ways. With dynamic sizes Inductor 2.13 takes the output for contiguous,
    while the kernel writes channels last: an assertion when compiled, wrong numbers in a package.
    """
    names = free_name(gm, "_two_channels_")
    for node in list(gm.graph.nodes):
        gemm = as_gemm(node)
        if gemm is None or node.target not in CONV or not _is_one_dynamic_channel(gemm.activation):
            continue
        weight, codes = gemm.weight.args[0], gemm.activation.args[0]
        values = constant(weight)
        grid = Grid.of(gemm.activation)
        if values is None or grid is None:
            continue
        spatial = [0, 0] * (values.dim() - 2)
        with gm.graph.inserting_before(gemm.weight):
            two = torch.nn.functional.pad(values, (*spatial, 0, 1))
            wide = insert_attribute(gm, next(names), two, like=gemm.weight, by="lowering")
        with gm.graph.inserting_before(gemm.activation):
            padded = _call(node, aten.constant_pad_nd.default, codes, [*spatial, 0, 1], grid.zero_point)
        gemm.weight.replace_input_with(weight, wide)  # type: ignore[arg-type]
        gemm.activation.replace_input_with(codes, padded)  # type: ignore[arg-type]
    return tidy(gm)


def _is_one_dynamic_channel(activation: Node) -> bool:
    value = activation.meta.get("val")
    if not is_dequantize(activation) or not isinstance(value, Tensor) or value.dim() not in (3, 4):
        return False
    return value.shape[1] == 1 and not all(isinstance(size, int) for size in value.shape)


def drop_unread_rounding(gm: GraphModule) -> GraphModule:
    """Drop quantize-dequantize pairs of activations that no integer kernel reads: they cost time and precision.

    gm.meta[DROPPED_KEY] lists the quantize nodes by the names that they have in the converted graph.
    """
    for quantize in gm.graph.find_nodes(op="call_function", target=Q.quantize_per_tensor.default):
        readers = list(quantize.users)
        if not readers or not all(r.target is Q.dequantize_per_tensor.default for r in readers):
            continue
        if any(_reads_integers(user, reader) for reader in readers for user in reader.users):
            continue
        gm.meta.setdefault(DROPPED_KEY, []).append(origin(quantize))
        for reader in readers:
            reader.replace_all_uses_with(quantize.args[0])
    return tidy(gm)


def _reads_integers(user: Node, value: Node) -> bool:
    """An integer kernel begins at the user, or what the user makes of the integers is one again: a shorter way."""
    gemm = as_gemm(user)
    if gemm is not None:
        return gemm.activation is value
    if user.target in ADD:
        return any(_is_integer_product(other) for other in user.all_input_nodes if other is not value)
    return user.target in MAX_POOL or any(is_quantize(after) for after in user.users)


def _is_integer_product(node: Node) -> bool:
    gemm = as_gemm(node)
    return gemm is not None and is_dequantize(gemm.activation)


def own_weights(gm: GraphModule) -> GraphModule:
    """Copy an integer weight that several operators read, such as all steps of an RNN, for each product but the last.

    Inductor merges equal dequantizes, and its patterns are for one reader. It packs the weight for each product anyway.
    """
    names = free_name(gm, "_own_weight_")
    readers: Counter[str] = Counter()
    for node in filter(is_dequantize, gm.graph.nodes):
        if constant(node.args[0]) is not None:
            readers[str(node.args[0].target)] += len(node.users)
    for node in list(gm.graph.nodes):
        gemm = as_gemm(node)
        codes = gemm.weight.args[0] if gemm is not None and is_dequantize(gemm.weight) else None
        values, name = constant(codes), str(getattr(codes, "target", ""))
        if gemm is None or values is None or readers[name] < 2:
            continue
        readers[name] -= 1
        with gm.graph.inserting_before(node):
            own = insert_attribute(gm, next(names), values.clone(), like=gemm.weight, by="lowering")
            weight = _call(node, gemm.weight.target, own, *gemm.weight.args[1:])
        weight.kwargs, weight.meta["val"] = gemm.weight.kwargs, gemm.weight.meta.get("val")
        node.replace_input_with(gemm.weight, weight)
    return tidy(gm)


def keep_inputs(graph: Graph) -> None:
    """Stop Inductor from writing a sum into an input or a parameter of the program. For its own graph, before code.

    Its fused kernels add in the memory of the other operand. Inductor 2.13 asks whether that has other readers, and not
    whose it is: `relu(x + linear(x))` leaves the sum in the caller's x.
    """
    for node in list(graph.nodes):
        name = getattr(node.target, "__name__", "")
        operand = node.kwargs.get({"qlinear_binary": "x_2", "qconv_binary": "accum"}.get(name, ""))
        if not isinstance(operand, Node) or not _belongs_to_the_caller(operand):
            continue
        if name == "qlinear_binary":
            node.update_kwarg("binary_op_name", "add")  # into memory of its own
        else:
            with graph.inserting_before(node):
                own = graph.call_function(aten.clone.default, (operand,))
            own.meta.update(operand.meta)
            node.update_kwarg("accum", own)


def _belongs_to_the_caller(node: Node) -> bool:
    while node.op == "call_function" and op_name(node) in _MOVES and isinstance(node.args[0], Node):
        node = node.args[0]
    return node.op in ("placeholder", "get_attr")


def _call(like: Node, target: object, *args: object) -> Node:
    return copy_origin(like.graph.call_function(target, args), like, "lowering")  # type: ignore[arg-type]


INDUCTOR_PASSES: tuple[Callable[[GraphModule], GraphModule], ...] = (
    own_dequantizes, float32_between_integers, move_integers, drop_unread_rounding, contiguous_rows, conv1d_as_conv2d,
    second_channel, integer_weights, cast_float16, own_weights,
)  # fmt: skip
