"""Control flow that ExecuTorch would run with wrong numbers: made safe where it can be, refused where it cannot.

ExecuTorch plans the memory of all nested graphs of a program in one place, and hands out what a branch returns where it
lies: the next nested graph to run overwrites it (github.com/pytorch/executorch/issues/21490, executorch 1.5.1).
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from ...errors import LoweringError
from ...graph.module import tidy
from ...graph.nested import graphs, nested_calls
from ...meta import PORTABLE
from ...where import copy_origin, locate_all

__all__ = ["check_control_flow", "copy_results_of_branches"]

_HIGHER_ORDER = torch.ops.higher_order
_WHY = "it copies a result of cond before the next nested graph runs, for which a delegate may come too late"


def check_control_flow(gm: GraphModule) -> None:
    """Raise for while_loop, which ExecuTorch lacks, and where a nested graph runs another one and is overwritten by it.

    Raises:
        LoweringError: there is such a call; each is named.
    """
    calls = {path: _calls(part) for path, part in graphs(gm)}
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


def copy_results_of_branches(gm: GraphModule) -> GraphModule:
    """Copy what cond returns, when more nested graphs run after it. Nodes are marked with their origin already."""
    calls = _calls(gm)
    branches = [call for call in calls[:-1] if call.target is _HIGHER_ORDER.cond]
    for result in [result for call in branches for result in call.users]:
        with gm.graph.inserting_after(result):
            copy = gm.graph.call_function(torch.ops.aten.clone.default, (result,))
        copy_origin(copy, result, "copy_results_of_branches")
        copy.meta.update({key: result.meta[key] for key in ("val", "tensor_meta") if key in result.meta})
        copy.meta["custom"] = {**result.meta["custom"], PORTABLE: _WHY}
        result.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)  # type: ignore[misc]
    return tidy(gm) if branches else gm


def _calls(gm: GraphModule) -> list[Node]:
    """Autocast regions are inlined before memory is planned."""
    return [call for call, _ in nested_calls(gm) if call.target is not _HIGHER_ORDER.wrap_with_autocast]
