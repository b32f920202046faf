"""Operators that ExecuTorch takes apart when it lowers become their parts before, where passes can still see them.

Taken apart later, the parts would share one dequantize, and ExecuTorch's passes on memory layouts misplace a tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from ..graph.module import tidy
from ..graph.write import Symbol, Writer
from ..ops import COMPOSITE

__all__ = ["take_apart"]

_WHOLE = frozenset((*COMPOSITE, torch.ops.aten.unfold.default))


def take_apart(gm: GraphModule) -> GraphModule:
    """Replace each such operator by the core ATen operators that torch writes it with."""
    write = Writer(gm, "take_apart")
    found = [node for node in gm.graph.nodes if node.op == "call_function" and node.target in _WHOLE]
    for node in found:
        if all("val" in source.meta for source in node.all_input_nodes):
            with write.before(node):
                write.replace(node, _parts(node, write))
    return tidy(gm) if found else gm


def _parts(node: Node, write: Writer) -> Symbol:
    sources = node.all_input_nodes
    values = [source.meta["val"] for source in sources]

    def whole(*tensors: Tensor) -> Any:
        given = dict(zip(sources, tensors, strict=True))
        args, kwargs = map_arg((node.args, node.kwargs), given.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    traced = make_fx(whole, decomposition_table=dict(core_aten_decompositions()))(*values)
    known: dict[Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), map(write, sources), strict=True))
    for part in traced.graph.nodes:
        if part.op == "call_function":
            args, kwargs = map_arg((part.args, part.kwargs), lambda used: known[used])
            known[part] = write.call(part.target, *args, **kwargs)
        elif part.op == "get_attr":
            known[part] = write.constant(getattr(traced, str(part.target)))
    return known[traced.graph.output_node().args[0]]  # type: ignore[index,no-any-return]
