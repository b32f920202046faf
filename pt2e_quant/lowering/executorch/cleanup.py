"""Passes on a converted graph before it is lowered: drop what computes nothing, spell shapes as backends match them.

None of them changes a value. They edit a private copy, after `convert_pt2e` and before the graph is exported again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ...arguments import bind, mutates, set_argument
from ...graph.attributes import attribute, constant, free_name, insert_attribute, set_attribute
from ...graph.module import tidy
from ...graph.write import emit
from ...grid import Grid
from ...ops import DROPOUT, is_call, is_dequantize, is_quantize, is_value_preserving, op_name
from ...passes.fold_constants import fold_constants
from ...where import copy_origin
from ..common.gemm import Q, as_gemm
from .xnnpack.patterns import refusals

__all__ = [
    "PASSES",
    "XNNPACK_PASSES",
    "cancel_requantize",
    "matmul_to_bmm",
    "own_biases",
    "own_storage",
    "quantize_padding",
    "remove_identities",
    "spell_out_shapes",
    "spell_out_strides",
    "split_into_slices",
]

aten = torch.ops.aten
Step = tuple[Any, tuple[Any, ...]]
"""An operator and its arguments after the first."""

_COPIES = frozenset(("clone", "contiguous", "to", "_to_copy", "alias", "detach", "lift_fresh", "expand", "slice"))
_RESHAPES = frozenset(
    ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as")
)


def remove_identities(gm: GraphModule) -> GraphModule:
    """Drop dropout in inference, detach, checks of dtypes, and copies and views that change nothing.

    Between an operator and its quantize each of them would keep the backend from seeing one integer kernel.
    """
    for check in gm.graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
        gm.graph.erase_node(check)  # export leaves one beside each .to(); the dtypes are those of this graph
    writes = any(is_call(node) and mutates(node.target) for node in gm.graph.nodes)
    for node in list(gm.graph.nodes):
        if is_call(node) and _is_identity(node, writes) and not _passes_an_input_through(node):
            node.replace_all_uses_with(node.all_input_nodes[0])
            gm.graph.erase_node(node)
    return tidy(gm)


def _is_identity(node: Node, graph_writes: bool) -> bool:
    if node.target in DROPOUT:
        return is_value_preserving(node)
    if op_name(node) not in _COPIES or not node.all_input_nodes:
        return False
    if op_name(node) in ("clone", "contiguous", "to", "_to_copy") and graph_writes:
        return False  # the copy may be there to survive a write to the original
    old, new = node.all_input_nodes[0].meta.get("val"), node.meta.get("val")
    return isinstance(old, Tensor) and isinstance(new, Tensor) and _layout(old) == _layout(new)


def _layout(value: Tensor) -> tuple[Any, ...]:
    return value.dtype, value.device, tuple(map(str, value.shape)), tuple(map(str, value.stride()))


def _passes_an_input_through(node: Node) -> bool:
    """Without the node, the graph would return one of its own inputs or parameters."""
    return node.all_input_nodes[0].op != "call_function" and any(user.op == "output" for user in node.users)


def cancel_requantize(gm: GraphModule) -> GraphModule:
    """Replace quantize(dequantize(q, p), p) by q. With equal qparams, float32 returns every code of 8 or 16 bits."""
    for quantize in gm.graph.find_nodes(op="call_function", target=Q.quantize_per_tensor.default):
        dequantize, grid = quantize.args[0], Grid.of(quantize)
        if grid is None or not is_dequantize(dequantize) or Grid.of(dequantize) != grid:
            continue
        codes = dequantize.args[0]
        whole = torch.iinfo(grid.dtype)
        inside = grid.bounds == (whole.min, whole.max) or (is_quantize(codes) and Grid.of(codes) == grid)
        if whole.bits <= 16 and inside and bind(dequantize)["out_dtype"] in (None, torch.float32):
            quantize.replace_all_uses_with(codes)
    return tidy(gm)


def own_storage(gm: GraphModule) -> GraphModule:
    """Give every parameter and buffer that is a view of a larger or permuted tensor a contiguous storage of its own.

    XNNPACK reads constants from the start of their storage, whatever their offset.
    """
    for node in gm.graph.find_nodes(op="get_attr"):
        value = attribute(gm, str(node.target))
        if not isinstance(value, Tensor) or isinstance(value, torch.nn.Parameter):
            continue
        if not value.is_contiguous() or value.untyped_storage().nbytes() != value.numel() * value.element_size():
            set_attribute(gm, str(node.target), value.detach().clone(memory_format=torch.contiguous_format))
    return tidy(gm)


def spell_out_shapes(gm: GraphModule) -> GraphModule:
    """Write every reshape as view or reshape to literal sizes, with -1 for the one that depends on the inputs.

    XNNPACK takes neither squeeze, nor unsqueeze before the last dimension, nor sizes computed while running.
    """
    for node in list(gm.graph.nodes):
        if not is_call(node) or op_name(node) not in _RESHAPES:
            continue
        sizes = _literal_sizes(node)
        if sizes is not None:
            _replace(node, _reshaped(node, sizes))
    return tidy(gm)


def _reshaped(node: Node, sizes: list[int]) -> list[Step]:
    """A view, after a copy where it needs one: for a reshape, export writes computed sizes instead of -1."""
    if op_name(node) in ("squeeze", "unsqueeze", "view"):
        return [(aten.view.default, (sizes,))]
    if -1 in sizes:
        return [(aten.contiguous.default, ()), (aten.view.default, (sizes,))]
    return [(aten.reshape.default, (sizes,))]


def spell_out_strides(gm: GraphModule) -> GraphModule:
    """Write the stride of a max_pool2d that leaves it to its default, which is the kernel's size.

    ExecuTorch 1.4 looks for it in the arguments and fails when there is none.
    """
    for node in gm.graph.nodes:
        if is_call(node) and op_name(node) == "max_pool2d" and not bind(node)["stride"]:
            set_argument(node, "stride", list(bind(node)["kernel_size"]))
    return gm


def split_into_slices(gm: GraphModule) -> GraphModule:
    """Write split, chunk, unbind and select as slices, which XNNPACK takes, of tensors whose shape is known."""
    for node in list(gm.graph.nodes):
        if not is_call(node) or not _is_static(node.all_input_nodes[:1]):
            continue
        name = op_name(node)
        if name == "select":
            bound = bind(node)
            if isinstance(bound["index"], int):
                _replace(node, _select(node, bound["dim"], bound["index"]))
        elif name in ("split", "split_with_sizes", "chunk", "unbind", "tensor_split"):
            _slice_parts(node)
    return tidy(gm)


def matmul_to_bmm(gm: GraphModule) -> GraphModule:
    """Write the product of two computed tensors with equal batch dimensions as bmm between views.

    Of 2-d tensors ExecuTorch makes an mm, which XNNPACK leaves outside; of others an expand for each operand, which
    expands nothing and cuts the delegate in two.
    """
    for node in list(gm.graph.nodes):
        if not is_call(node) or node.target not in (aten.matmul.default, aten.mm.default):
            continue
        left, right = node.args[:2]
        m, k, n = (_literal_sizes(tensor) for tensor in (left, right, node))
        if m is None or k is None or n is None or not _multiplies_in_batches(left, right, m, k):
            continue
        with gm.graph.inserting_before(node):
            if len(n) != 3:
                left = emit(node, "lowering", aten.reshape.default, left, [_merged(m[:-2]), *m[-2:]])
                right = emit(node, "lowering", aten.reshape.default, right, [_merged(k[:-2]), *k[-2:]])
            value = emit(node, "lowering", aten.bmm.default, left, right)
            if len(n) != 3:
                value = emit(node, "lowering", aten.view.default, value, n)
        node.replace_all_uses_with(value)
        gm.graph.erase_node(node)
    return tidy(gm)


def _multiplies_in_batches(left: Node, right: Node, m: list[int], k: list[int]) -> bool:
    """False for vectors, for factors of which one is broadcast, and for matrices that XNNPACK takes as weights."""
    if len(m) < 2 or len(m) != len(k) or m[:-2] != k[:-2]:
        return False
    return len(m) > 2 or not (_is_constant(left) or _is_constant(right))


def _merged(sizes: list[int]) -> int:
    return -1 if -1 in sizes else math.prod(sizes)


def _is_constant(node: Node) -> bool:
    source = node.args[0] if is_dequantize(node) else node
    return constant(source) is not None


def own_biases(gm: GraphModule) -> GraphModule:
    """Give a bias that several nodes read, as when a module is called twice, to each integer kernel as its own copy.

    XNNPACK makes a bias an integer with the scale of input times weight, and does so once: for its first reader.
    """
    readers = Counter(str(node.target) for node in gm.graph.find_nodes(op="get_attr") for _ in node.users)
    names = free_name(gm, "_bias_")
    for node in list(gm.graph.nodes):
        gemm = as_gemm(node)
        if gemm is None or gemm.dynamic or gemm.bias is None or readers[str(gemm.bias.target)] < 2:
            continue
        value = constant(gemm.bias)
        if value is not None:
            with gm.graph.inserting_before(node):
                copied = nn.Parameter(value.detach().clone(), requires_grad=False)
                own = insert_attribute(gm, next(names), copied, like=gemm.bias, by="lowering")
            node.replace_input_with(gemm.bias, own)
    return tidy(gm)


def quantize_padding(gm: GraphModule) -> GraphModule:
    """Put quantize and dequantize, on the grid of the input, after zeros padded to a dequantized tensor.

    Zero and the tensor's own values lie on that grid, so no value changes. XNNPACK marks every such pad as one on
    integers; when no integer kernel follows, its delegate would fail to load.
    """
    for node in list(gm.graph.nodes):
        if not _pads_with_zeros(node) or any(is_quantize(user) for user in node.users):
            continue
        dequantize = node.all_input_nodes[0]
        users = list(node.users)
        gemm = as_gemm(users[0]) if len(users) == 1 else None
        taken = gemm is not None and not any(refusals(gemm))
        grid = Grid.of(dequantize)
        if grid is None or taken:
            continue
        with gm.graph.inserting_after(node):
            codes = _call(node, Q.quantize_per_tensor.default, node, *grid.arguments)
        for user in users:
            with gm.graph.inserting_before(user):
                value = _call(node, dequantize.target, codes, *dequantize.args[1:], **dequantize.kwargs)
            user.replace_input_with(node, value)
    return tidy(gm)


def _pads_with_zeros(node: Node) -> bool:
    if not is_call(node) or op_name(node) not in ("pad", "constant_pad_nd"):
        return False
    bound = bind(node)
    return bound.get("mode", "constant") == "constant" and not bound["value"]


PASSES: tuple[Callable[[GraphModule], GraphModule], ...] = (remove_identities, cancel_requantize, own_storage)
"""What every graph goes through."""

XNNPACK_PASSES: tuple[Callable[[GraphModule], GraphModule], ...] = (
    fold_constants, matmul_to_bmm, split_into_slices, spell_out_shapes, spell_out_strides, own_biases, quantize_padding,
)  # fmt: skip
"""What a graph for XNNPACK goes through afterwards."""


def _slice_parts(node: Node) -> None:
    parts = list(node.users)
    if not all(getattr(part.target, "__name__", "") == "getitem" for part in parts):
        return
    dim, offset, offsets = int(bind(node).get("dim", 0)), 0, []
    unbound = op_name(node) == "unbind"
    for value in node.meta["val"]:
        size = 1 if unbound else value.shape[dim]
        offsets.append((offset, size))
        offset += size
    for part in parts:
        index = int(part.args[1])  # type: ignore[arg-type]
        start, size = offsets[index]
        steps = _select(node, dim, start) if unbound else [(aten.slice.Tensor, (dim, start, start + size))]
        _replace(part, steps, source=node.all_input_nodes[0])


def _select(node: Node, dim: int, index: int) -> list[Step]:
    shape = list(node.all_input_nodes[0].meta["val"].shape)
    dim %= len(shape)
    index %= shape[dim]
    rest = shape[:dim] + shape[dim + 1 :]
    return [(aten.slice.Tensor, (dim, index, index + 1)), (aten.reshape.default, (rest,))]


def _is_static(nodes: list[Node]) -> bool:
    values = [node.meta.get("val") for node in nodes]
    return bool(values) and all(
        isinstance(value, Tensor) and all(isinstance(size, int) for size in value.shape) for value in values
    )


def _literal_sizes(node: Node) -> list[int] | None:
    """The sizes of the node's value with at most one -1; None when more than one is unknown."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    sizes = [size if isinstance(size, int) else -1 for size in value.shape]
    return sizes if sizes.count(-1) <= 1 and 0 not in sizes else None


def _replace(node: Node, steps: list[Step], source: Node | None = None) -> None:
    """Put the calls `steps` in the place of one node, on the node's input or on `source`.

    Between dequantize and quantize on one grid, each step gets a dequantize and a quantize of its own, so that all of
    them are integer kernels.
    """
    graph = node.graph
    value = source or node.all_input_nodes[0]
    quantize = _enclosing_quantize(value, node)
    with graph.inserting_before(node):
        codes: Any = value.args[0] if quantize else None
        dequantize = value
        for number, (target, arguments) in enumerate(steps):
            if quantize is not None:
                if number:
                    codes = _call(node, quantize.target, value, *quantize.args[1:])
                value = _call(node, dequantize.target, codes, *dequantize.args[1:], **dequantize.kwargs)
            value = _call(node, target, value, *arguments)
    node.replace_all_uses_with(value)
    graph.erase_node(node)


def _enclosing_quantize(source: Node, node: Node) -> Node | None:
    """The quantize after the node, when source is a dequantize on the same grid."""
    users, grid = list(node.users), Grid.of(source)
    same = grid is not None and len(users) == 1 and is_quantize(users[0]) and Grid.of(users[0]) == grid
    return users[0] if same else None


def _call(like: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    return copy_origin(like.graph.call_function(target, args, kwargs), like, "lowering")
