"""Run an exported float graph over calibration batches and look at the inputs of its linears."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from ..arguments import bind, mutated_arguments
from ..errors import CalibrationError
from ..graph.constants import Constants
from ..graph.module import ExportedModule, clone, tidy
from ..ops import LINEAR
from ..passes.follow_in_place import follow_in_place

__all__ = [
    "NO_BATCH",
    "Batches",
    "constant_linears",
    "inputs_of",
    "private_copy",
    "rounded_weight",
    "run_again",
    "run_all",
]

Batches = Iterable[tuple[Any, ...]]
"""Positional arguments of the model, one tuple for each batch."""

NO_BATCH = "there is no calibration batch; pass a list of tuples of the model's arguments"

_ROWS = 512


def private_copy(model: ExportedProgram | GraphModule) -> ExportedModule:
    """A draft of the caller's graph; readers of a tensor that was written to in place read the result of that."""
    gm = clone(model.module() if isinstance(model, ExportedProgram) else model)
    follow_in_place(gm)
    tidy(gm)
    return gm


def constant_linears(gm: GraphModule, constants: Constants) -> list[Node]:
    """The linears whose weight is stored, in graph order."""
    linears = [node for node in gm.graph.nodes if node.op == "call_function" and node.target in LINEAR]
    return [node for node in linears if bind(node)["weight"].op == "get_attr" and bind(node)["weight"] in constants]


def run_all(gm: GraphModule, batch: tuple[Any, ...]) -> dict[Node, Any]:
    """The value of every node for one batch, that of the output node included."""
    interpreter = _Keeping(gm, garbage_collect_values=False)
    with torch.no_grad():
        output = interpreter.run(*pytree.tree_leaves(batch), enable_io_processing=False)
    return {**interpreter.env, gm.graph.output_node(): output}


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
        return _Keeping(gm, garbage_collect_values=False).run(initial_env=known, enable_io_processing=False)


class _Keeping(Interpreter):
    """Lets in-place operators write to copies, so that the values of all nodes stay what they were."""

    def run_node(self, n: Node) -> Any:
        written = mutated_arguments(n.target)
        if not written or any(n.args[index].op == "get_attr" for index in written):  # type: ignore[union-attr]
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        copies = [arg.clone() if index in written else arg for index, arg in enumerate(args)]
        return self.call_function(n.target, tuple(copies), kwargs)


def inputs_of(gm: GraphModule, batches: Batches) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of each input of a linear, by name: the largest magnitude of each channel, and a sample of up to 512 rows.

    Raises:
        CalibrationError: there is no batch.
    """
    inputs = dict.fromkeys(bind(node)["input"] for node in gm.graph.nodes if node.target in LINEAR)
    peaks: dict[str, Tensor] = {}
    rows: dict[str, list[Tensor]] = {}
    count = 0
    for batch in batches:
        count += 1
        values = run_all(gm, batch)
        for node in inputs:
            name, value = node.name, values[node]
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
