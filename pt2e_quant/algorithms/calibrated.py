"""Run an exported float graph over calibration batches and look at the inputs of its linears."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..arguments import bind
from ..graph.constants import Constants
from ..graph.run import Watcher, batches_of
from ..ops import LINEAR

__all__ = [
    "Batches",
    "constant_linears",
    "inputs_of",
    "rounded_weight",
    "run_again",
    "run_all",
]

Batches = Iterable[Any]
"""Batches as `graph.run.batches_of` takes them."""

_ROWS = 512


def constant_linears(gm: GraphModule, constants: Constants) -> list[Node]:
    """The linears whose weight is stored, in graph order."""
    linears = [node for node in gm.graph.nodes if node.op == "call_function" and node.target in LINEAR]
    return [node for node in linears if bind(node)["weight"].op == "get_attr" and bind(node)["weight"] in constants]


def run_all(gm: GraphModule, batch: Any) -> dict[Node, Any]:
    """The value of every node for one batch; of the output node, the outputs, flat."""
    values: dict[Node, Any] = {}
    outputs = Watcher(gm, values.__setitem__, keep_values=True).run_batch(batch)
    return {**values, gm.graph.output_node(): outputs}


def run_again(gm: GraphModule, values: dict[Node, Any], changed: Node, compute: Callable[..., Any]) -> Any:
    """The output of the model when one node computes something else of its arguments; only what follows is run."""
    stale = {changed}
    for node in gm.graph.nodes:
        if not stale.isdisjoint(node.all_input_nodes):
            stale.add(node)
    known = {node: value for node, value in values.items() if node not in stale}
    args, kwargs = torch.fx.node.map_arg((changed.args, changed.kwargs), values.__getitem__)
    with torch.no_grad():
        known[changed] = compute(*args, **kwargs)
        return Watcher(gm, _unseen, keep_values=True).run(initial_env=known, enable_io_processing=False)


def _unseen(node: Node, value: Any) -> None:
    """Nobody looks at the values of a run that is for its outputs."""


def inputs_of(gm: GraphModule, batches: Batches) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of each input of a linear, by name: the largest magnitude of each channel, and a sample of up to 512 rows.

    Raises:
        CalibrationError: there is no batch.
    """
    inputs = dict.fromkeys(bind(node)["input"] for node in gm.graph.nodes if node.target in LINEAR)
    peaks: dict[str, Tensor] = {}
    rows: dict[str, list[Tensor]] = {}
    for arguments in batches_of(batches, "calibration"):
        values = run_all(gm, arguments)
        for node in inputs:
            name, value = node.name, values[node]
            flat = value.detach().reshape(-1, value.shape[-1])
            peak = flat.abs().amax(0)
            peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak
            rows.setdefault(name, []).append(flat)
    return peaks, {name: _sample(torch.cat(parts)) for name, parts in rows.items()}


def rounded_weight(weight: Tensor, channels: int = 0) -> Tensor:
    """The weight as int8 per output channel keeps it; `channels` is their dimension."""
    others = [dim for dim in range(weight.dim()) if dim != channels]
    steps = (weight.abs().amax(others, keepdim=True) / 127).clamp_min(1e-12)
    return torch.round(weight / steps) * steps


def _sample(rows: Tensor) -> Tensor:
    """Rows at equal distances, so that every batch has its share."""
    return rows[:: -(-len(rows) // _ROWS)]
