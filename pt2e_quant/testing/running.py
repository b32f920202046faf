"""Running a graph without a trace: inputs and buffers that it writes to are given back as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree

__all__ = ["run", "state_kept"]


def run(gm: GraphModule, model: ExportedProgram) -> list[Any]:
    """All outputs of a graph on copies of the example inputs of a model. Observers keep what they see."""
    inputs, keywords = _pytree.tree_map_only(Tensor, torch.clone, model.example_inputs or ((), {}))
    with state_kept(gm):
        outputs = gm(*inputs, **keywords)
        return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in _pytree.tree_leaves(outputs)]


@contextlib.contextmanager
def state_kept(gm: GraphModule) -> Iterator[None]:
    """Without gradients, and with the buffers of the model, which its copies share, restored at the end."""
    read = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    before = [(buffer, buffer._version, buffer.clone()) for name, buffer in gm.named_buffers() if name in read]
    with torch.no_grad():
        try:
            yield
        finally:
            for buffer, version, value in before:
                if buffer._version != version:
                    buffer.copy_(value)
