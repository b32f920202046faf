"""The contract once more, on what ExecuTorch put into XNNPACK's delegates: it takes operators apart after our passes.

An integer kernel is an operator between dequantizes and a quantize that ExecuTorch has marked as parts of it. A mark on
anything else hands integers to a float kernel, or floats to an integer one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.fx import GraphModule, Node

from ....errors import LoweringError
from ....where import locate
from ...common.entry import by_origin, origin
from ..account import delegate_graphs, edge_name
from ..runtime import is_implicit

__all__ = ["check_delegates"]


def check_delegates(lowered: GraphModule, converted: GraphModule) -> None:
    """Raise where the marks of quantize and dequantize do not enclose one kernel.

    Raises:
        LoweringError: there is such a place; each is named.
    """
    found = [(node, why) for graph in delegate_graphs(lowered) for node in graph.nodes for why in _findings(node)]
    if not found:
        return
    sources = by_origin(converted)
    listing = "\n".join(
        f"- {why}\n  {locate(sources.get(origin(node), node))}".replace("\n", "\n  ") for node, why in found
    )
    raise LoweringError(
        f"ExecuTorch took {len(found)} operator{'s' * (len(found) > 1)} apart so that XNNPACK would compute on wrong "
        f"numbers (preflight=False lowers it anyway):\n{listing}\n"
        "  Keep them in float, and report them: a pass has to take them apart first."
    )


def _findings(node: Node) -> Iterator[str]:
    if not _is_enclosing(node, "dequantize_per_"):
        return
    users = list(node.users)
    if len(users) > 1 and not all("linear" in edge_name(user) or "addmm" in edge_name(user) for user in users):
        yield f"the integers of {node} feed {len(users)} operators ({', '.join(edge_name(user) for user in users)})"
    for user in users:
        if _is_static(node) and _ends_in_float(user):
            yield f"{edge_name(user)} reads the integers of {node}, and its result is not quantized"


def _is_enclosing(node: Node, kind: str) -> bool:
    return node.op == "call_function" and kind in edge_name(node) and is_implicit(node)


def _is_static(dequantize: Node) -> bool:
    """Of an activation whose scale is a number; weights are read by their kernel alone."""
    scale: Any = dequantize.args[1]
    return not isinstance(scale, Node)


def _ends_in_float(kernel: Node) -> bool:
    """No quantize follows, also not after what is fused: padding before, an activation after."""
    users = list(kernel.users)
    for _ in range(3):
        if any("quantize_per_" in edge_name(user) and is_implicit(user) for user in users):
            return False
        users = [user for near in users for user in near.users] if len(users) == 1 else []
    return True
