"""Write a copy into memory that was made for it, `torch.empty_like(x).copy_(x)`, as a clone.

ExecuTorch has no kernel for empty_like, and the copy would cut a delegate in two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from ....arguments import bind
from ....graph.module import tidy
from ....graph.write import Symbol, Writer, call
from ....ops import functional, is_call

__all__ = ["copies_to_fresh_memory"]

aten = torch.ops.aten
_MAKE = frozenset({"empty", "empty_like", "new_empty", "zeros", "zeros_like", "new_zeros", "empty_strided"})


def copies_to_fresh_memory(gm: GraphModule) -> GraphModule:
    """Where nothing but the copy reads the memory: what it held before is gone."""
    found = [node for node in gm.graph.nodes if is_call(node) and _is_copy_to_fresh(node)]
    write = Writer(gm, "copies_to_fresh_memory")
    for node in found:
        with write.before(node):
            write.replace(node, _copied(node, write))
    return tidy(gm) if found else gm


def _is_copy_to_fresh(node: Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or functional(node.target) is not aten.copy.default:
        return False
    memory: Any = node.args[0]
    made = is_call(memory) and getattr(memory.target, "_opname", "") in _MAKE
    return made and list(memory.users) == [node]


def _copied(node: Node, write: Writer) -> Symbol:
    source, wanted = write(bind(node)["src"]), node.meta["val"]
    value: Any = source.to(wanted.dtype)
    if value.shape != wanted.shape:
        value = call(aten.expand.default, value, list(wanted.shape))
    return call(aten.clone.default, value)  # type: ignore[no-any-return]  # as the copy has memory of its own
