"""Write operators whose arguments ExecuTorch or XNNPACK has no kernel for, or a wrong one, as others that it has."""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ....arguments import bind
from ....graph.module import tidy
from ....graph.write import Writer, function
from .looks import literal_sizes
from .steps import Emit, replace_by_steps

__all__ = ["arguments_with_kernels"]

aten = torch.ops.aten
leaky_relu, maximum = function(aten.leaky_relu.default), function(aten.amax.default)
largest, pad = function(aten.max.dim), function(aten.constant_pad_nd.default)
prelu = function(aten.prelu.default)

_IMAGE = 4


def arguments_with_kernels(gm: GraphModule) -> GraphModule:
    """Each operator of the table below, where its form is not the one that is needed."""
    write = Writer(gm, "arguments_with_kernels")
    for node in [node for node in gm.graph.nodes if node.op == "call_function" and node.target in _FORMS]:
        steps = _FORMS[node.target](node)
        if steps is not None:
            replace_by_steps(write, node, steps)
    for node in gm.graph.find_nodes(op="call_function", target=aten.max.dim):
        if all(user.target is operator.getitem and user.args[1] == 0 for user in node.users):
            for value in list(node.users):
                replace_by_steps(write, value, _largest(node), source=node.all_input_nodes[0])
    return tidy(gm)


def _in_inference(node: Node) -> list[Emit] | None:
    """rrelu, for which there is no kernel: in inference the slope is the middle of its range."""
    bound = bind(node)
    slope = (bound["lower"] + bound["upper"]) / 2
    return None if bound["training"] else [lambda x: leaky_relu(x, slope)]


def _slices(node: Node) -> list[Emit] | None:
    """A pad by negative amounts, for which there is no kernel: what it cuts off is sliced away first."""
    bound = bind(node)
    amounts, sizes = list(bound["pad"]), literal_sizes(bound["self"])
    if bound.get("mode", "constant") != "constant" or not any(_cuts(amount) for amount in amounts):
        return None
    steps = [
        _slice(len(sizes) - 1 - dim, sizes[len(sizes) - 1 - dim], *amounts[2 * dim : 2 * dim + 2])
        for dim in range(len(amounts) // 2)
        if any(map(_cuts, amounts[2 * dim : 2 * dim + 2]))
    ]
    rest = [0 if _cuts(amount) else amount for amount in amounts]
    return [*steps, lambda x: pad(x, rest, bound["value"] or 0)] if any(rest) else steps


def _cuts(amount: Any) -> bool:
    return isinstance(amount, int) and amount < 0


def _slice(dim: int, size: int, before: Any, after: Any) -> Emit:
    start, cut = (-amount if _cuts(amount) else 0 for amount in (before, after))
    end = size - cut if size >= 0 else -cut or None
    return lambda x: x.slice(dim, start, end)


def _largest(node: Node) -> list[Emit]:
    """The values of max along a dimension: with it kept where XNNPACK pools, else as amax, which it never takes."""
    bound = bind(node)
    rank = len(literal_sizes(bound["self"]))
    dim = bound["dim"] % max(rank, 1)
    pools = rank == 4 and dim in (2, 3)
    kept: Emit = lambda x: largest(x, dim, True)[0] if pools else maximum(x, [dim], True)  # noqa: E731
    return [kept] if bound["keepdim"] else [kept, lambda x: x.squeeze(dim)]


def _in_a_batch(node: Node) -> list[Emit] | None:
    """A pool of one image, which ExecuTorch cannot lower."""
    pool, (_, *rest) = function(node.target), node.args
    if len(literal_sizes(node)) != 3:
        return None
    return [lambda x: x.unsqueeze(0), lambda x: pool(x, *rest, **node.kwargs), lambda x: x.squeeze(0)]


def _in_four_dimensions(node: Node) -> list[Emit] | None:
    """prelu, which ExecuTorch's pass on layouts takes of four dimensions only."""
    sizes, (_, slopes) = literal_sizes(node), node.args
    rank = len(sizes)
    if rank == _IMAGE or (rank > _IMAGE and sizes.count(-1) > 1):
        return None
    rectify: Emit = lambda x: prelu(x, slopes)  # noqa: E731
    if rank > _IMAGE:
        return [lambda x: x.flatten(3), rectify, lambda x: x.view(sizes)]
    batch: list[Emit] = [lambda x: x.unsqueeze(0)] if rank < 2 else []
    added = _IMAGE - max(rank, 2)
    after: list[Emit] = [lambda x: x.squeeze(0)] if rank < 2 else []
    return [*batch, *[lambda x: x.unsqueeze(-1)] * added, rectify, *[lambda x: x.squeeze(-1)] * added, *after]


_FORMS: MappingProxyType[Any, Callable[[Node], list[Emit] | None]] = MappingProxyType({
    aten.rrelu.default: _in_inference,
    aten.pad.default: _slices,
    aten.constant_pad_nd.default: _slices,
    aten.max_pool2d.default: _in_a_batch,
    aten.avg_pool2d.default: _in_a_batch,
    aten.prelu.default: _in_four_dimensions,
})  # fmt: skip
