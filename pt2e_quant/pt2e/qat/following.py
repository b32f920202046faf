"""Follower: a converted model that computes, after each rounding, on what the trained model has there.

So no difference adds up, and each rounding shows what it brings by itself. A copy of the trained model keeps what its
fake quantizers give; a copy of the converted one compares what it dequantizes with that, and goes on with what was
kept. The two find each other by provenance: quantize and dequantize stem from the call of the fake quantizer.

Before this: `convert_pt2e`. After it: `check` says which difference is too large.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ...arguments import bind
from ...fake_quantize import is_fake_quantizer
from ...graph.attributes import attribute, free_name
from ...graph.constants import Constants
from ...graph.nested import graphs
from ...graph.run import run_batch
from ...ops import is_dequantize, is_quantize
from ...where import in_graph

__all__ = ["Follower"]

Kept: TypeAlias = dict[str, list[Tensor]]
"""What fake quantizers gave in one run, by the names of their calls; in a loop, a call gives several."""

See: TypeAlias = Callable[[Node, Tensor, torch.dtype], None]

_GROUPS = torch.ops.quantized_decomposed.dequantize_per_channel_group.default


class Follower:
    """Runs both models on batches.

    Args:
        prepared, converted: copies in evaluation, which it edits.
        see: called with each quantize of an activation, by how many steps each value differs, and the type of values.
    """

    def __init__(self, prepared: GraphModule, converted: GraphModule, see: See) -> None:
        self._prepared, self._converted = prepared, converted
        self._kept: Kept = defaultdict(list)
        calls = set(_keep(prepared, self._kept))
        self._comparing = list(_compare(converted, calls, self._kept, see))

    def run(self, batch: Any) -> tuple[list[Any], list[Any]]:
        """The outputs of both, flat."""
        for values in self._kept.values():
            values.clear()
        for module in self._comparing:
            module.runs = 0
        return run_batch(self._prepared, batch), run_batch(self._converted, batch)


def _keep(prepared: GraphModule, kept: Kept) -> Iterator[str]:
    """Let the calls of fake quantizers be kept; their names, seen from the outermost graph."""
    for _, part in graphs(prepared):
        for call in part.graph.find_nodes(op="call_module"):
            if is_fake_quantizer(attribute(part, str(call.target))):
                name = in_graph(part, call.name)
                _insert(part, call, _Keeping(kept, name))
                yield name
        part.recompile()


def _compare(converted: GraphModule, calls: set[str], kept: Kept, see: See) -> Iterator[_Comparing]:
    for _, part in graphs(converted):
        constants = Constants(part)
        for node in [node for node in part.graph.nodes if is_dequantize(node) and node not in constants]:
            name, quantize = in_graph(part, _stems_from(node)), node.args[0]
            if name in calls and is_quantize(quantize) and node.target is not _GROUPS:
                module = _Comparing(quantize, bind(node).get("axis"), kept[name], see)
                _insert(part, node, module, node.args[1])
                yield module
        part.recompile()


def _stems_from(node: Node) -> str:
    sources = node.meta.get("from_node")
    return sources[-1].name if sources else ""


def _insert(gm: GraphModule, node: Node, module: nn.Module, *arguments: Any) -> None:
    """Let all readers of a node read what the module makes of it."""
    target = next(free_name(gm, "_follower_"))
    gm.add_module(target, module)
    with gm.graph.inserting_after(node):
        call = gm.graph.call_module(target, (node, *arguments))
    node.replace_all_uses_with(call, lambda user: user is not call)


class _Keeping(nn.Module):
    def __init__(self, kept: Kept, name: str) -> None:
        super().__init__()
        self._kept, self._name = kept, name

    def forward(self, x: Tensor) -> Tensor:
        self._kept[self._name].append(x.clone())  # the model may write to it
        return x


class _Comparing(nn.Module):
    def __init__(self, quantize: Node, axis: int | None, kept: list[Tensor], see: See) -> None:
        super().__init__()
        self.runs = 0
        self._quantize, self._axis, self._kept, self._see = quantize, axis, kept, see

    def forward(self, x: Tensor, step: Tensor | float) -> Tensor:
        if self.runs == len(self._kept):  # the trained model took another branch, or left the loop earlier
            return x
        expected = self._kept[self.runs]
        self.runs += 1
        if isinstance(step, Tensor) and self._axis is not None:
            step = step.reshape([-1 if dim == self._axis % x.dim() else 1 for dim in range(x.dim())])
        self._see(self._quantize, (x.double() - expected.double()).abs() / step, expected.dtype)
        return expected.to(x.dtype, copy=True)
