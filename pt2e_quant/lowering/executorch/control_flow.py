"""Control flow that ExecuTorch would run with wrong numbers: refused where `copy_results_of_branches` cannot help."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from ...errors import LoweringError
from ...graph.nested import graphs, nested_calls
from ...where import locate_all

__all__ = ["calls_of_nested_graphs", "check_control_flow"]

_HIGHER_ORDER = torch.ops.higher_order


def check_control_flow(gm: GraphModule) -> None:
    """Raise for while_loop, which ExecuTorch lacks, and where a nested graph runs another one and is overwritten by it.

    Raises:
        LoweringError: there is such a call; each is named.
    """
    calls = {path: calls_of_nested_graphs(part) for path, part in graphs(gm)}
    loops = [call for found in calls.values() for call in found if call.target is _HIGHER_ORDER.while_loop]
    if loops:
        raise LoweringError(
            f"ExecuTorch has no while_loop:\n{locate_all(loops, limit=3)}\n"
            "  Repeat the body a fixed number of times (a Python loop, or scan), or loop around the program."
        )
    inner = [call for path, found in calls.items() for call in found if path]
    if inner:
        raise LoweringError(
            f"{len(inner)} calls of nested graphs lie inside of nested graphs, which ExecuTorch runs with wrong "
            f"results (executorch issue 21490):\n{locate_all(inner, limit=3)}\n"
            "  Write them one after the other, or choose with torch.where."
        )


def calls_of_nested_graphs(gm: GraphModule) -> list[Node]:
    """In their order; autocast regions are inlined before memory is planned."""
    return [call for call, _ in nested_calls(gm) if call.target is not _HIGHER_ORDER.wrap_with_autocast]
