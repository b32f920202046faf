"""Give every reader a dequantize of its own, as convert_pt2e does: later passes change it for one reader."""

from __future__ import annotations

from torch.fx import GraphModule

from ..ops import is_dequantize

__all__ = ["own_dequantizes"]


def own_dequantizes(gm: GraphModule) -> GraphModule:
    """Copy each dequantize for its readers but the first."""
    for node in list(filter(is_dequantize, gm.graph.nodes)):
        for user in list(node.users)[1:]:
            with gm.graph.inserting_before(user):
                user.replace_input_with(node, gm.graph.node_copy(node, lambda source: source))
    return gm
