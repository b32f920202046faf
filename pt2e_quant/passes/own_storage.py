"""Give constants a storage of their own: backends read them from the start of their storage, whatever their offset."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..graph.attributes import attribute, set_attribute
from ..graph.module import tidy

__all__ = ["own_storage"]


def own_storage(gm: GraphModule) -> GraphModule:
    """Copy every buffer that is a view of a larger or permuted tensor."""
    for node in gm.graph.find_nodes(op="get_attr"):
        value = attribute(gm, str(node.target))
        if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
            continue
        if not value.is_contiguous() or value.untyped_storage().nbytes() != value.numel() * value.element_size():
            set_attribute(gm, str(node.target), value.detach().clone(memory_format=torch.contiguous_format))
    return tidy(gm)
