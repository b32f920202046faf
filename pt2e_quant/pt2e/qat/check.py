"""check_converted: a converted model computes what the model that was trained computes in evaluation.

Before this: `convert_pt2e`. After it: lowering, whose own check compares the artefact with the converted graph.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from ...checks import checked
from ...errors import ConversionError
from ...fake_quantize import is_fake_quantizer
from ...graph.run import batches_of, run_batch
from ...grid import Grid
from ..record import record_of

__all__ = ["Parity", "check_converted"]

_PARTS = 256
"""Of the range of an output in float: one of them is a step of 8 bits."""


@dataclass(frozen=True)
class Parity:
    """How far a converted model is from the prepared one.

    steps: of each output, in the order of the model's leaves, the largest difference in units of its grid; of an output
           in float, in 256ths of the range that it has in the data
    values: how many values were compared
    off: of each output, how many of them differ by more than the steps that were allowed
    """

    steps: tuple[float, ...]
    values: int
    off: tuple[int, ...] = ()

    @property
    def largest(self) -> float:
        return max(self.steps, default=0.0)


@torch.no_grad()
@checked(ConversionError)
def check_converted(prepared: nn.Module, converted: GraphModule, data: Iterable[Any], *, within: float = 1.0) -> Parity:
    """Compare a converted model with the prepared one in evaluation, with its ranges as they are.

    A float sum that rounds otherwise can fall on the other side of a border between two integers, so one step is no
    fault; more is, unless that happened in the middle of the model, and what follows made a few values larger. The
    error counts those. Two numbers of half precision are no closer than their last bit: up to 2 steps more in
    bfloat16. Both models stay as they were.

    Args:
        prepared: what `prepare_qat_pt2e` returned, trained; or `prepare_pt2e`, with specs that make fake quantizers.
        converted: what `convert_pt2e` made of it.
        data: batches, as `graph.run.batches_of` takes them.
        within: steps of an output's grid that it may be off.

    Raises:
        ConversionError: an output is further off, `converted` is not a converted model, or `prepared` does not round.
        CalibrationError: there is no batch.
    """
    outputs = _output_nodes(converted)
    if not any(map(is_fake_quantizer, prepared.modules())):
        raise ConversionError("the first argument of check_converted is the model that was trained, which rounds")
    reference = copy.deepcopy(prepared).eval()
    for module in filter(is_fake_quantizer, reference.modules()):
        module.enable_observer(getattr(module, "is_dynamic", False))  # type: ignore[operator]
    result = copy.deepcopy(converted).eval()
    runs = [(_leaves(reference, batch), _leaves(result, batch)) for batch in batches_of(data, "check_converted")]
    parity = _parity(outputs, runs, within)
    if any(parity.off):
        raise ConversionError(_apart(parity, outputs, within))
    return parity


def _parity(outputs: list[Node], runs: list[tuple[list[Tensor], list[Tensor]]], within: float) -> Parity:
    steps, off, values = [], [], 0
    for index, node in enumerate(outputs):
        expected = torch.cat([run[0][index].flatten() for run in runs])
        got = torch.cat([run[1][index].flatten() for run in runs])
        apart = (got - expected).abs() / _step(node, expected)
        steps.append(float(apart.max()) if len(got) else 0.0)
        off.append(int((~(apart <= within + _rounding(node))).sum()))  # NaN is off
        values += len(got)
    return Parity(tuple(steps), values, tuple(off))


def _rounding(node: Node) -> float:
    """Steps that two numbers of up to 256 steps can be further apart than their integers are: the last bits of both."""
    dtype = node.meta["val"].dtype
    return _PARTS * torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def _output_nodes(converted: GraphModule) -> list[Node]:
    record = record_of(converted)
    if record is None or record.stage != "converted":
        raise ConversionError("the second argument of check_converted is what convert_pt2e returned")
    found = [leaf for leaf in pytree.tree_leaves(converted.graph.output_node().args[0]) if isinstance(leaf, Node)]
    return [node for node in found if isinstance(node.meta.get("val"), Tensor)]


def _leaves(model: nn.Module, batch: Any) -> list[Tensor]:
    return [leaf.double() for leaf in run_batch(model, batch) if isinstance(leaf, Tensor)]


def _step(node: Node, values: Tensor) -> float:
    grid = Grid.of_value(node)
    if grid is not None:
        return grid.scale
    ends = torch.aminmax(values)
    return float(ends.max - ends.min) / _PARTS or 1.0


def _apart(parity: Parity, outputs: list[Node], within: float) -> str:
    lines = [f"the converted model is not the one that was trained: {within:g} steps of an output's grid are allowed."]
    for node, steps, off in zip(outputs, parity.steps, parity.off, strict=True):
        if off:
            lines.append(f"  {node.name} is {steps:.3g} steps off; {off} of its values are further off than allowed")
    lines.append(
        "  Was the prepared model trained, or run with its observers on, after convert_pt2e? Convert it again then.\n"
        "  Are few values off? A rounding in the middle may have met a border between two integers: pass within=."
    )
    return "\n".join(lines)
