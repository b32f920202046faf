"""Models in bfloat16 or float16: float32 between the integers.

An integer kernel adds up in int32 and scales in float32, whatever the model computes in. Inductor's patterns look for
float32 there; those that it has for bfloat16 want casts that no converted graph holds. And a dequantize to bfloat16
they take for one to float32: what follows would read numbers of the wrong width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ....graph.attributes import constant
from ....graph.halves import is_half, widen
from ....graph.module import tidy
from ....graph.write import Writer
from ....ops import ADD, is_dequantize, is_quantize
from ...common.gemm import gemms
from ..limits import AFTER_CONV, AFTER_LINEAR

__all__ = ["float32_between_integers", "leave"]

_TO = torch.ops.aten.to.dtype
_FUSED = frozenset((*AFTER_CONV, *AFTER_LINEAR, *ADD))


def float32_between_integers(gm: GraphModule) -> GraphModule:
    """Compute in float32 from the integers that a product reads to the end of its kernel, and cast what leaves it."""
    write = Writer(gm, "float32_between_integers", "_float32_")
    for gemm in gemms(gm):
        if not gemm.is_integer or not is_half(gemm.node):
            continue
        half = gemm.node.meta["val"].dtype
        kernel = _kernel(gemm.node)
        for part in kernel:
            for source in part.all_input_nodes:
                if source not in kernel and is_half(source):
                    _feed(write, part, source)
            widen(part)
        leave(write, kernel[-1], half)
    return tidy(gm)


def leave(write: Writer, last: Node, half: torch.dtype) -> None:
    """Cast for those who read the kernel's result in the dtype of the model; a quantize takes float32."""
    readers = [user for user in last.users if not is_quantize(user)]
    casts = [user for user in readers if user.target is _TO and user.args[1] is torch.float32]
    for cast in casts:  # before another kernel
        cast.replace_all_uses_with(last)
    readers = [user for user in readers if user not in casts]
    if not readers:
        return
    with write.after(last):
        narrow = write(last).to(half)
    for user in readers:
        user.replace_input_with(last, narrow.node)


def _kernel(node: Node) -> list[Node]:
    """The product and the elementwise ops after it that may become one kernel, in order."""
    nodes = [node]
    while len(node.users) == 1:
        (node,) = node.users
        if node.target not in _FUSED or not is_half(node):
            break
        nodes.append(node)
    return nodes


def _feed(write: Writer, part: Node, source: Node) -> None:
    """Give a part of the kernel this operand in float32."""
    if "out_dtype" in source.kwargs and is_dequantize(source) and len(source.users) == 1:
        widen(source)
        return
    values = constant(source)
    with write.before(part, like=source):
        if values is None:
            wide = write(source).to(torch.float32)
        else:
            wide = write.constant(nn.Parameter(values.detach().float(), requires_grad=False))
    part.replace_input_with(source, wide.node)
