"""Which nodes of a graph are constant, and what they hold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..arguments import mutated_arguments
from ..checks import checked
from ..errors import CaptureError
from ..where import locate
from .attributes import attribute, written_attributes

__all__ = ["Constants"]


class Constants:
    """Which nodes of a graph have a value that no input changes, and what it is.

    A node is constant when it reads a parameter or buffer that nothing in the graph writes to, or is a pure op on
    constants (weight_norm, a transposed weight, ...).
    """

    @checked(CaptureError)
    def __init__(self, gm: GraphModule) -> None:
        self._gm = gm
        self._values: dict[Node, Any] = {}
        self._nodes: set[Node] = set()
        overwritten = written_attributes(gm)
        for node in gm.graph.nodes:
            self.note(node, overwritten)

    def note(self, node: Node, overwritten: Iterable[str] = ()) -> None:
        """Look at one more node, whose inputs were looked at before."""
        if node.op == "get_attr":
            target = str(node.target)
            known = target not in overwritten and isinstance(_maybe_attribute(self._gm, target), Tensor)
        else:
            inputs = node.all_input_nodes
            known = bool(inputs) and all(source in self._nodes for source in inputs) and _is_pure(node)
        if known:
            self._nodes.add(node)

    def __contains__(self, node: object) -> bool:
        return node in self._nodes

    def value(self, node: Node) -> Any:
        """The value of a constant node; computed once, without autograd.

        Raises:
            CaptureError: the node is not constant.
        """
        if node not in self._nodes:
            raise CaptureError(f"the value of this node is known only when the model runs:\n{locate(node)}")
        pending = [] if node in self._values else [node]
        while pending:  # iterative: chains of constants may be longer than Python's stack
            current = pending[-1]
            missing = [source for source in current.all_input_nodes if source not in self._values]
            if missing:
                pending += missing
                continue
            pending.pop()
            if current not in self._values:
                self._values[current] = self._compute(current)
        return self._values[node]

    def _compute(self, node: Node) -> Any:
        if node.op == "get_attr":
            return attribute(self._gm, str(node.target)).detach()
        args = torch.fx.node.map_arg(node.args, self._values.__getitem__)
        kwargs = torch.fx.node.map_arg(node.kwargs, self._values.__getitem__)
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]


def _maybe_attribute(gm: nn.Module, target: str) -> Any:
    try:
        return attribute(gm, target)
    except AttributeError:
        return None


def _is_pure(node: Node) -> bool:
    if node.op != "call_function":
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return getattr(node.target, "__name__", "") == "getitem"
    return torch.Tag.nondeterministic_seeded not in node.target.tags and not mutated_arguments(node.target)
