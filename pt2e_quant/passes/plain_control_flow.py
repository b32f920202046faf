"""Control flow that observers can stand in: while a model is prepared, nested graphs run as plain Python calls.

torch traces the bodies of scan, and of the other ops on the way back, when gradients are recorded. Observers cannot be
traced, since what they do depends on values. The functions below run each body as often as the op does, on the values
that it would see, with gradients as everywhere else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._C import DispatchKey
from torch.fx import GraphModule

from ..graph.nested import graphs

__all__ = ["cond", "map_impl", "scan", "to_operators", "to_plain_functions", "while_loop"]

_OPS = torch.ops.higher_order


def cond(*args: Any) -> Any:
    """torch.ops.higher_order.cond without tracing."""
    return _run(_OPS.cond, args)


def while_loop(*args: Any) -> Any:
    """torch.ops.higher_order.while_loop without tracing."""
    return _run(_OPS.while_loop, args)


def scan(*args: Any) -> Any:
    """torch.ops.higher_order.scan without tracing."""
    return _run(_OPS.scan, args)


def map_impl(*args: Any) -> Any:
    """torch.ops.higher_order.map_impl without tracing."""
    return _run(_OPS.map_impl, args)


def _run(op: Any, args: tuple[Any, ...]) -> Any:
    return op.py_kernels[DispatchKey.CompositeExplicitAutograd](*args)


_PLAIN = {_OPS.cond: cond, _OPS.while_loop: while_loop, _OPS.scan: scan, _OPS.map_impl: map_impl}


def to_plain_functions(gm: GraphModule) -> GraphModule:
    """Replace each op by its function."""
    return _replace(gm, _PLAIN)


def to_operators(gm: GraphModule) -> GraphModule:
    """The way back."""
    return _replace(gm, {function: op for op, function in _PLAIN.items()})


def _replace(gm: GraphModule, new: dict[Any, Any]) -> GraphModule:
    parts = [part for _, part in graphs(gm)]
    for node in (node for part in parts for node in part.graph.nodes if len(parts) > 1):
        if node.op == "call_function" and node.target in new:
            node.target = new[node.target]
    return gm
