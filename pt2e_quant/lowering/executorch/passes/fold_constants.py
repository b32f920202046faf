"""Compute once what depends on no input: positions, causal masks and the like, when all sizes are fixed.

XNNPACK has no kernels for integers: they would be computed in every run, outside of the delegates.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ....arguments import mutates
from ....graph.attributes import free_name, insert_attribute
from ....graph.constants import Constants
from ....graph.module import tidy
from ....ops import EMBEDDING, is_call, op_name

__all__ = ["LARGEST", "fold_constants"]

LARGEST = 2**16
"""Elements of the largest tensor that is stored instead of computed: a mask of 256 x 256."""

_UNKNOWN = frozenset(("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "empty_permuted"))


def fold_constants(gm: GraphModule) -> GraphModule:
    """Replace small tensors that no input changes by buffers. Tables and quantized weights stay as they are stored."""
    if any(is_call(node) and mutates(node.target) for node in gm.graph.nodes):
        return gm  # a write to a computed tensor must not reach a stored one
    constants = Constants(gm)
    values = {node: constants.value(node) for node in gm.graph.find_nodes(op="get_attr") if node in constants}
    names = free_name(gm, "_folded_")
    for node in list(gm.graph.nodes):
        if not _is_plain(node) or not values.keys() >= set(node.all_input_nodes):
            continue
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        with torch.no_grad():
            values[node] = node.target(*args, **kwargs)
    for node in list(values):
        if is_call(node) and not node.users.keys() <= values.keys():
            with gm.graph.inserting_before(node):
                stored = insert_attribute(gm, next(names), values[node].contiguous().clone(), like=node, by="lowering")
            # A graph that returns a constant still computes it: what it returned must not be one tensor in every run.
            node.replace_all_uses_with(stored, delete_user_cb=lambda user: user.op != "output")
    return tidy(gm)


def _is_plain(node: Node) -> bool:
    """One small tensor of fixed shape, the same in every run; neither looked up nor dequantized."""
    target, value = node.target, node.meta.get("val")
    if not isinstance(target, torch._ops.OpOverload) or target in EMBEDDING or op_name(node) in _UNKNOWN:
        return False
    if target.namespace != "aten" or torch.Tag.nondeterministic_seeded in target.tags or not isinstance(value, Tensor):
        return False
    sizes = list(value.shape)
    return all(isinstance(size, int) for size in sizes) and value.numel() <= LARGEST
