"""Copy what cond returns, when more nested graphs run after it.

ExecuTorch plans the memory of all nested graphs of a program in one place, and hands out what a branch returns where it
lies: the next nested graph to run overwrites it (github.com/pytorch/executorch/issues/21490, executorch 1.5.1).
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from ....graph.module import tidy
from ....graph.write import Writer, function
from ....meta import PORTABLE, mark
from ..control_flow import calls_of_nested_graphs

__all__ = ["copy_results_of_branches"]

clone = function(torch.ops.aten.clone.default)
_WHY = "it copies a result of cond before the next nested graph runs, for which a delegate may come too late"


def copy_results_of_branches(gm: GraphModule) -> GraphModule:
    """Nodes are marked with their origin already."""
    calls = calls_of_nested_graphs(gm)
    branches = [call for call in calls[:-1] if call.target is torch.ops.higher_order.cond]
    write = Writer(gm, "copy_results_of_branches")
    for result in [result for call in branches for result in call.users]:
        with write.after(result):
            copy = clone(write(result)).node
        mark(copy, PORTABLE, _WHY)
        result.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)  # type: ignore[misc]
    return tidy(gm) if branches else gm
