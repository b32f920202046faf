"""Linears with a static input on two dimensions: Gemm is the only product that adds a bias to integers.

torch writes a linear on more dimensions as MatMul and Add. onnxruntime joins the two to a Gemm of its own, and in front
of it copies the quantize of the input with the wrong type where that is signed, so that the file does not load.
"""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from ....graph.module import tidy
from ....graph.write import Symbol, Writer
from ....ops import LINEAR, RELUS, is_quantize
from ...common.gemm import Gemm, gemms, output_quantize
from .pairs import dequantized, moved
from .sizes import sizes_of

__all__ = ["linears_on_rows"]


def linears_on_rows(gm: GraphModule) -> GraphModule:
    """The input becomes rows of a matrix, the output gets its shape back."""
    write = Writer(gm, "linears_on_rows")
    for gemm in gemms(gm):
        static = gemm.is_integer and not gemm.dynamic and is_quantize(gemm.activation.args[0])
        if gemm.node.target in LINEAR and static and gemm.node.meta["val"].dim() != 2:
            _rewrite(write, gemm)
    return tidy(gm)


def _rewrite(write: Writer, gemm: Gemm) -> None:
    quantize: Any = gemm.activation.args[0]
    ends_in = output_quantize(gemm.node, RELUS)
    last = ends_in or gemm.node
    inputs = gemm.weight.meta["val"].shape[1]
    with write.before(gemm.node):
        rows = moved(write, quantize, quantize, lambda x: x.reshape([-1, inputs]))
        value = write.call(gemm.node.target, dequantized(write, quantize, rows), gemm.weight, gemm.bias)
    with write.before(last):
        for node in _between(gemm.node, last):
            value = write.call(node.target, value, *node.args[1:], **node.kwargs)
        write.replace(last, _shaped(write, gemm, ends_in, value))


def _shaped(write: Writer, gemm: Gemm, quantize: Node | None, rows: Symbol) -> Symbol:
    sizes = [*sizes_of(write(gemm.activation))[:-1], gemm.node.meta["val"].shape[-1]]
    if quantize is None:
        return rows.reshape(sizes)  # type: ignore[no-any-return]
    return moved(write, quantize, rows, lambda x: x.reshape(sizes))


def _between(node: Node, last: Node) -> list[Node]:
    """What follows a product, up to its quantize, that one included."""
    found: list[Node] = []
    while node is not last:
        (node,) = node.users
        found.append(node)
    return found
