"""Write arguments that were left at their default, where ExecuTorch's passes look for them by position."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from ....arguments import bind, set_argument

__all__ = ["spell_out_defaults"]

aten = torch.ops.aten


def spell_out_defaults(gm: GraphModule) -> GraphModule:
    """The stride of max_pool2d, which is the kernel's size, and the bounds of hardtanh."""
    for node in gm.graph.find_nodes(op="call_function", target=aten.max_pool2d.default):
        if not bind(node)["stride"]:
            set_argument(node, "stride", list(bind(node)["kernel_size"]))
    for node in gm.graph.find_nodes(op="call_function", target=aten.hardtanh.default):
        bound = bind(node)
        for name in ("min_val", "max_val"):
            set_argument(node, name, float(bound[name]))
    return gm
