"""Run an exported float graph over calibration batches and look at the inputs of its linears."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from ..arguments import bind
from ..errors import CalibrationError
from ..graph import Constants
from ..ops import LINEAR

__all__ = ["NO_BATCH", "Batches", "constant_linears", "inputs_of", "rounded_weight", "run"]

Batches = Iterable[tuple[Any, ...]]
"""Positional arguments of the model, one tuple for each batch."""

NO_BATCH = "there is no calibration batch; pass a list of tuples of the model's arguments"

_ROWS = 512


def constant_linears(gm: GraphModule, constants: Constants) -> list[Node]:
    """The linears whose weight is stored, in graph order."""
    linears = [node for node in gm.graph.nodes if node.op == "call_function" and node.target in LINEAR]
    return [node for node in linears if bind(node)["weight"].op == "get_attr" and bind(node)["weight"] in constants]


def run(gm: GraphModule, batch: tuple[Any, ...], instead: dict[Node, Any] | None = None) -> tuple[dict[str, Any], Any]:
    """Execute the graph node by node; `instead` has functions that compute a node's value from its real arguments.

    Returns the inputs and outputs of linears, by the name of the node that made them, and the output of the model.
    """
    interpreter = _Watching(gm, instead or {})
    leaves = pytree.tree_leaves(batch)
    with torch.no_grad():
        output = interpreter.run(*leaves, enable_io_processing=False)
    return interpreter.seen, output


class _Watching(Interpreter):
    def __init__(self, gm: GraphModule, instead: dict[Node, Any]) -> None:
        super().__init__(gm)
        self.seen: dict[str, Any] = {}
        self._instead = instead
        linears = [node for node in gm.graph.nodes if node.op == "call_function" and node.target in LINEAR]
        self._watched = {*linears, *(bind(node)["input"] for node in linears)}

    def run_node(self, n: Node) -> Any:
        if n in self._instead:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return self._instead[n](*args, **kwargs)
        value = super().run_node(n)
        if n in self._watched:
            self.seen[n.name] = value
        return value


def inputs_of(gm: GraphModule, batches: Batches) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of each input of a linear, by name: the largest magnitude of each channel, and a sample of up to 512 rows.

    Raises:
        CalibrationError: there is no batch.
    """
    inputs = {bind(node)["input"].name for node in gm.graph.nodes if node.target in LINEAR}
    peaks: dict[str, Tensor] = {}
    rows: dict[str, list[Tensor]] = {}
    count = 0
    for batch in batches:
        count += 1
        seen = run(gm, batch)[0]
        for name in inputs:
            value = seen[name]
            flat = value.detach().reshape(-1, value.shape[-1])
            peak = flat.abs().amax(0)
            peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak
            rows.setdefault(name, []).append(flat)
    if not count:
        raise CalibrationError(NO_BATCH)
    return peaks, {name: _sample(torch.cat(parts)) for name, parts in rows.items()}


def rounded_weight(weight: Tensor) -> Tensor:
    """The weight as int8 per output channel keeps it."""
    steps = (weight.abs().amax(1, keepdim=True) / 127).clamp_min(1e-12)
    return torch.round(weight / steps) * steps


def _sample(rows: Tensor) -> Tensor:
    """Rows at equal distances, so that every batch has its share."""
    return rows[:: -(-len(rows) // _ROWS)]
