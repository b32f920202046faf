"""Models in float16 with integers that XNNPACK lays out channels last: float32 between the integers.

ExecuTorch writes a quantize and a dequantize around each change of layout, and that dequantize returns float32 whatever
the one before it returned. The delegate then writes float32 into the memory of float16 tensors: the process dies, or
the numbers are wrong (seen with executorch 1.5).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ....graph.attributes import constant
from ....graph.halves import is_half, widen
from ....graph.module import tidy
from ....graph.write import Writer
from ....ops import is_dequantize, is_quantize
from ..xnnpack.limits import CHANNELS_LAST

__all__ = ["float32_between_integers"]

_Q = torch.ops.quantized_decomposed


def float32_between_integers(gm: GraphModule) -> GraphModule:
    """Quantize from float32, compute in float32 up to the next quantize, and cast what leaves the integers."""
    between = _between_integers(gm)
    if CHANNELS_LAST.isdisjoint(node.target for node in between):
        return gm
    write = Writer(gm, "float32_between_integers", "_float32_")
    for node in list(gm.graph.nodes):
        if node in between:
            _widen_constants(write, node)
            widen(node)
        elif node.target is _Q.quantize_per_tensor.default:
            _read_float32(write, node)
        elif is_dequantize(node) and is_half(node):
            _return_float32(write, node, between)
    return tidy(gm)


def _between_integers(gm: GraphModule) -> set[Node]:
    """Nodes in half precision that read integers and constants alone, and that integers alone are made of."""
    found = {
        node for node in gm.graph.nodes if node.op == "call_function" and is_half(node) and not is_dequantize(node)
    }
    doubtful = list(found)
    while doubtful:
        node = doubtful.pop()
        if node in found and not _is_between(node, found):
            found.remove(node)
            doubtful += [*node.users, *node.all_input_nodes]
    return found


def _is_between(node: Node, between: set[Node]) -> bool:
    sources = [source for source in node.all_input_nodes if is_half(source) and constant(source) is None]
    reads = all(source in between or is_dequantize(source) for source in sources)
    return reads and bool(node.users) and all(user in between or is_quantize(user) for user in node.users)


def _widen_constants(write: Writer, node: Node) -> None:
    for source in node.all_input_nodes:
        if is_half(source) and (values := constant(source)) is not None:
            with write.before(node, like=source):
                wide = write.constant(nn.Parameter(values.detach().float(), requires_grad=False))
            node.replace_input_with(source, wide.node)


def _read_float32(write: Writer, quantize: Node) -> None:
    source = quantize.all_input_nodes[0]
    if is_half(source):
        with write.before(quantize, like=source):
            quantize.replace_input_with(source, write(source).to(torch.float32).node)


def _return_float32(write: Writer, dequantize: Node, between: set[Node]) -> None:
    """A dequantize whose quantize is static; those of weights and at run time stay as their kernels want them."""
    half = dequantize.meta["val"].dtype
    others = [user for user in dequantize.users if user not in between]
    static = dequantize.all_input_nodes[0].target is _Q.quantize_per_tensor.default
    if others and not static:
        return
    widen(dequantize)
    if others:
        with write.after(dequantize):
            narrow = write(dequantize).to(half).node
        for user in others:
            user.replace_input_with(dequantize, narrow)
