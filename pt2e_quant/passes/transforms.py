"""Rewrites that backends ask for before annotation (RuleQuantizer.transforms): they edit the graph and return it."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..arguments import bind, set_argument
from ..graph.attributes import free_name, insert_attribute
from ..graph.constants import Constants
from ..graph.module import tidy
from ..graph.values import copy_value, is_float_tensor, with_value
from ..ops import ADD, MUL, PAD, SPLIT, SUB, UNBIND, functional
from ..where import copy_origin

__all__ = [
    "clamp_to_hardtanh",
    "fold_zero_padding",
    "lift_scalars",
    "matmul_to_linear",
    "mean_keeps_dims",
    "split_to_slices",
]

aten = torch.ops.aten

_WITH_SCALARS = frozenset((*ADD, *MUL, *SUB))


def lift_scalars(gm: GraphModule) -> GraphModule:
    """Turn the number of x + 1.0, x * 2.0 and x - 3.0 into a 0-d buffer, so that it can be quantized like a tensor.

    Only where x is floating point and the result has the dtype of x: an integer x + 1 stays as it is.
    """
    names = free_name(gm, "_scalar_")
    found = [node for node in gm.graph.nodes if _has_scalar(node)]
    for node in found:
        with gm.graph.inserting_before(node):
            like = node.meta["val"]
            value = torch.tensor(float(node.args[1]), dtype=like.dtype, device="cpu" if like.is_meta else like.device)
            node.update_arg(1, insert_attribute(gm, next(names), value, like=node, by="lift_scalars"))
    return tidy(gm) if found else gm


def _has_scalar(node: Node) -> bool:
    if node.op != "call_function" or node.target not in _WITH_SCALARS or not is_float_tensor(node):
        return False
    tensor, number = (*node.args, None, None)[:2]
    return isinstance(number, (int, float)) and not isinstance(number, bool) and _same_dtype(node, tensor)


def _same_dtype(node: Node, tensor: object) -> bool:
    value = tensor.meta.get("val") if isinstance(tensor, Node) else None
    return isinstance(value, Tensor) and value.dtype == node.meta["val"].dtype


def matmul_to_linear(gm: GraphModule) -> GraphModule:
    """Turn mm, matmul and addmm by a constant 2-d matrix into linear, whose weight is stored (out, in).

    Backends have one integer linear and many half-supported forms of matmul. addmm with beta or alpha not 1 stays.
    """
    forms = (aten.mm.default, aten.matmul.default, aten.addmm.default)
    found = [node for node in gm.graph.nodes if node.target in forms and is_float_tensor(node)]
    if not found:
        return gm
    constants = Constants(gm)
    names = free_name(gm, "_linear_weight_")
    weights: dict[Node, Node] = {}
    for node in found:
        arguments = bind(node)
        if node.target is aten.addmm.default:
            bias, x, matrix = arguments["self"], arguments["mat1"], arguments["mat2"]
            fits = arguments["beta"] == 1 and arguments["alpha"] == 1 and bias.meta["val"].dim() == 1
        else:
            bias, (x, matrix), fits = None, node.args[:2], True
        if not fits or matrix not in constants or matrix.meta["val"].dim() != 2:
            continue
        with gm.graph.inserting_before(node):
            if matrix not in weights:
                weight = nn.Parameter(constants.value(matrix).t().contiguous(), requires_grad=False)
                weights[matrix] = insert_attribute(gm, next(names), weight, like=node, by="matmul_to_linear")
                constants.note(weights[matrix])
            args = (x, weights[matrix]) if bias is None else (x, weights[matrix], bias)
            _replace(node, gm.graph.call_function(aten.linear.default, args), "matmul_to_linear")
    return tidy(gm) if weights else gm


def mean_keeps_dims(gm: GraphModule) -> GraphModule:
    """Split the mean over height and width into one with keepdim=True and a flatten: some kernels know only that."""
    changed = False
    for node in gm.graph.find_nodes(op="call_function", target=aten.mean.dim):
        x, dims, keep = (*node.args, False)[:3]
        value = x.meta.get("val")
        spatial = isinstance(value, Tensor) and value.dim() == 4 and sorted(d % 4 for d in dims or ()) == [2, 3]
        if keep or not spatial:
            continue
        with gm.graph.inserting_before(node):
            mean = gm.graph.call_function(aten.mean.dim, (x, dims, True), node.kwargs)
            copy_origin(mean, node, "mean_keeps_dims")
            with_value(mean, node, lambda n=node: n.meta["val"].unsqueeze(-1).unsqueeze(-1))  # type: ignore[misc]
            _replace(node, gm.graph.call_function(aten.flatten.using_ints, (mean, 1)), "mean_keeps_dims")
        changed = True
    return tidy(gm) if changed else gm


def clamp_to_hardtanh(gm: GraphModule) -> GraphModule:
    """Name clamps by what backends fuse: clamp(x, a, b) is hardtanh(x, a, b), clamp(x, min=0) is relu(x)."""
    forms = (aten.clamp.default, aten.clip.default, aten.clamp_min.default)
    found = [node for node in gm.graph.nodes if node.target in forms]
    for node in found:
        bounds = bind(node)
        low, high = bounds["min"], bounds.get("max")
        if not is_float_tensor(node) or any(not isinstance(bound, (int, float, type(None))) for bound in (low, high)):
            continue
        with gm.graph.inserting_before(node):
            if low is not None and high is not None:
                args = (node.args[0], float(low), float(high))
                _replace(node, gm.graph.call_function(aten.hardtanh.default, args), "clamp_to_hardtanh")
            elif low == 0 and high is None:
                _replace(node, gm.graph.call_function(aten.relu.default, (node.args[0],)), "clamp_to_hardtanh")
    return tidy(gm) if found else gm


def fold_zero_padding(gm: GraphModule) -> GraphModule:
    """Let a convolution pad by itself where zeros stand alike on both sides of its input: nothing comes between."""
    changed = False
    for target in (aten.conv1d.default, aten.conv2d.default):
        for conv in gm.graph.find_nodes(op="call_function", target=target):
            pad = conv.args[0]
            amounts = _even_zeros(pad, spatial=conv.meta["val"].dim() - 2) if "val" in conv.meta else None
            if amounts is not None:
                own = list(bind(conv)["padding"])
                own = own * len(amounts) if len(own) == 1 else own
                set_argument(conv, "padding", [a + b for a, b in zip(own, amounts, strict=True)])
                conv.replace_input_with(pad, pad.args[0])
                changed = True
    return tidy(gm) if changed else gm


def _even_zeros(pad: object, spatial: int) -> list[int] | None:
    """Zeros that a pad adds on each side, by spatial dimension from first to last; None when it does anything else."""
    if not isinstance(pad, Node) or pad.target not in PAD:
        return None
    arguments = bind(pad)
    amounts = list(arguments["pad"])
    if arguments.get("mode", "constant") != "constant" or arguments["value"] or len(amounts) > 2 * spatial:
        return None
    sides = list(zip(amounts[::2], amounts[1::2], strict=True))
    if not all(isinstance(before, int) and before == after and before >= 0 for before, after in sides):
        return None
    return [before for before, _ in reversed(sides + [(0, 0)] * (spatial - len(sides)))]


def split_to_slices(gm: GraphModule) -> GraphModule:
    """Turn each part of a split or chunk into a slice, each part of an unbind into a select: ops with one output.

    Only where the sizes along the dimension that is split are known. A rule on slices then takes the parts.
    """
    found = [
        node for node in gm.graph.nodes if node.target in (*SPLIT, *UNBIND) and functional(node.target) is node.target
    ]
    for node in found:
        x, dim = node.args[0], int(bind(node).get("dim", 0))
        sizes = [1 if node.target in UNBIND else part.shape[dim] for part in node.meta.get("val", ())]
        parts = [user for user in node.users if user.target is operator.getitem]
        if len(parts) != len(node.users) or not all(isinstance(size, int) for size in sizes):
            continue
        for part in parts:
            index = int(part.args[1]) % len(sizes)
            start = sum(sizes[:index])
            with gm.graph.inserting_before(part):
                if node.target in UNBIND:
                    made = gm.graph.call_function(aten.select.int, (x, dim, index))
                else:
                    made = gm.graph.call_function(aten.slice.Tensor, (x, dim, start, start + sizes[index]))
                _replace(part, made, "split_to_slices")
    return tidy(gm) if found else gm


def _replace(old: Node, new: Node, by: str) -> None:
    """Let `new`, which computes the same value, take the place of `old`."""
    copy_value(copy_origin(new, old, by), old)
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
