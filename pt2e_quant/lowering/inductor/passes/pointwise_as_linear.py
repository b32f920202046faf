"""Compute a convolution of kernel size 1 as a linear over its pixels, which Inductor can tune its own kernels for."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ....arguments import bind
from ....graph.attributes import constant
from ....graph.module import tidy
from ....graph.write import Writer, call
from ....grid import Grid
from ....ops import ADD, RELU, is_quantize
from ...common.gemm import Gemm, gemms

__all__ = ["pointwise_as_linear"]

aten = torch.ops.aten


def pointwise_as_linear(gm: GraphModule) -> GraphModule:
    """Where nothing but relu lies between it and its quantize, since linear kernels fuse no more than that, and where
    no sum reads the result: convolutions add into the memory of the other operand, and take no view for that."""
    write = Writer(gm, "pointwise_as_linear", "_pixels_")
    for gemm in gemms(gm):
        node = gemm.node
        if node.target is not aten.conv2d.default or not _is_pointwise(gemm):
            continue
        quantize, values = _quantize_after(node), constant(gemm.weight.args[0])
        if quantize is None or values is None:
            continue
        with write.before(gemm.weight):
            gemm.weight.update_arg(0, write.constant(values.flatten(1)).node)
        with write.before(gemm.activation, like=node):
            last = call(aten.permute.default, write(gemm.activation.args[0]), [0, 2, 3, 1])
            gemm.activation.update_arg(0, call(aten.contiguous.default, last).node)
        node.target, node.args, node.kwargs = aten.linear.default, (gemm.activation, gemm.weight, gemm.bias), {}
        write.follow(quantize, lambda result: call(aten.permute.default, result, [0, 3, 1, 2]))
    return tidy(gm)


def _is_pointwise(gemm: Gemm) -> bool:
    bound, value = bind(gemm.node), gemm.activation.meta.get("val")
    if Grid.of(gemm.activation) is None or not isinstance(value, Tensor):
        return False  # with qparams of run time, or in float
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
