"""check_converted: a converted model computes what the model that was trained computes in evaluation.

Before this: `convert_pt2e`. After it: lowering, whose own check compares the artefact with the converted graph.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from textwrap import indent
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from ...arguments import bind
from ...checks import checked
from ...errors import ConversionError
from ...fake_quantize import is_fake_quantizer
from ...graph.module import uncompiled
from ...graph.nested import every_node
from ...graph.run import batches_of, run_batch
from ...grid import Grid
from ...ops import is_dequantize, is_quantize, is_value_preserving
from ...where import locate, node_id
from ..record import record_of
from .following import Follower

__all__ = ["Parity", "check_converted"]

_PARTS = 256
"""Of the range of an output in float: one of them is a step of 8 bits."""

_MOST = 8


@dataclass(frozen=True)
class Parity:
    """How far a converted model is from the prepared one.

    own:    of each tensor that is rounded, and each output in float, by the name of the node that computes it: the
            largest difference in steps of its grid that it brings by itself, computed on what the prepared model has
            before it. Steps of an output in float are 256ths of the range that it has in the data
    steps:  of each output, in the order of the model's leaves: the same where each model computes on its own values
            all the way, so that differences add up
    values: how many values of outputs were compared
    """

    own: Mapping[str, float]
    steps: tuple[float, ...]
    values: int

    @property
    def largest(self) -> float:
        """Of `own`."""
        return max(self.own.values(), default=0.0)


@torch.no_grad()
@checked(ConversionError)
def check_converted(prepared: nn.Module, converted: GraphModule, data: Iterable[Any], *, within: float = 1.0) -> Parity:
    """Compare a converted model with the prepared one in evaluation, with its ranges as they are.

    Between two roundings, both compute the same real number from the same inputs, but not in the same order: the one
    divides the weight and normalizes, the other has folded that. The results differ by d, a few last bits, which is far
    less than a step s. Then round(x / s) and round((x + d) / s) differ by 1 at most, and only where x lies within d of
    a border between two integers. So one step at each rounding is no fault, and more is.

    For outputs there is no such bound. That one step changes by s what the layers behind it read; each multiplies it by
    its gain and may push other values over borders, so that a model without a fault can be 10 steps off in a few
    outputs. So `within` is asked of each rounding by itself, computed on what the prepared model has before it, and of
    outputs in float likewise; `Parity.steps` tells what adds up.

    Two numbers in floating point are no closer than their last bits, in which every operator since the last rounding
    rounds its own result: in a grid of n steps, n * eps steps are allowed on top for each, which counts in half
    precision (n = 256: 2 steps in bfloat16, 0.25 in float16). Both models stay as they were.

    Args:
        prepared: what `prepare_qat_pt2e` returned, trained; or `prepare_pt2e`, with specs that make fake quantizers.
        converted: what `convert_pt2e` made of it.
        data: batches, as `graph.run.batches_of` takes them.
        within: steps that each rounding, and each output in float, may be off by itself.

    Raises:
        ConversionError: one is further off, `converted` is not a converted model, or `prepared` does not round.
        CalibrationError: there is no batch.
    """
    outputs = _output_nodes(converted)
    reference = _at_rest(prepared)
    result = copy.deepcopy(converted).eval()
    own = _Own(within)
    follower = Follower(reference, copy.deepcopy(result), own.see)
    runs = [
        [_tensors(leaves) for leaves in (*follower.run(batch), run_batch(result, batch))]
        for batch in batches_of(data, "check_converted")
    ]
    steps, values = _of_outputs(outputs, runs, own)
    own.check({node_id(node): node for node in every_node(converted)})
    return Parity(own.steps, steps, values)


def _of_outputs(outputs: list[Node], runs: list[list[list[Tensor]]], own: _Own) -> tuple[tuple[float, ...], int]:
    """(steps of each output where differences add up, how many values there are); shows `own` the rest.

    runs: of each batch, the outputs of the trained model, of the one that follows it, and of the converted one
    """
    steps, values = [], 0
    for index, node in enumerate(outputs):
        expected, following, alone = (
            torch.cat([one[index].flatten() for one in run]) for run in zip(*runs, strict=True)
        )
        step = _step(node, expected)
        own.see(node, (following - expected).abs() / step, node.meta["val"].dtype)
        steps.append(_largest((alone - expected).abs() / step))
        values += len(expected)
    return tuple(steps), values


def _at_rest(prepared: nn.Module) -> GraphModule:
    """A copy in evaluation whose ranges stay as they are.

    Raises:
        ConversionError: it does not round.
    """
    model = uncompiled(prepared)
    found = [module for module in model.modules() if is_fake_quantizer(module)]
    if not found or not isinstance(model, GraphModule):
        raise ConversionError("the first argument of check_converted is the model that was trained, which rounds")
    if any(module.fake_quant_enabled[0] != 1 for module in found):
        raise ConversionError(
            "the first argument of check_converted does not round everywhere, as the converted model does: call "
            "enable_fake_quant(prepared) before."
        )
    reference = copy.deepcopy(model).eval()
    for module in filter(is_fake_quantizer, reference.modules()):
        module.enable_observer(getattr(module, "is_dynamic", False))  # type: ignore[operator]
    return reference


@dataclass
class _Own:
    """What each rounding brings by itself, with those of its values that are further off than allowed."""

    within: float
    steps: dict[str, float] = field(default_factory=dict)
    off: dict[str, int] = field(default_factory=dict)
    allowed: dict[Node, float] = field(default_factory=dict)

    def see(self, node: Node, apart: Tensor, dtype: torch.dtype) -> None:
        name = node_id(_rounded(node))
        self.steps[name] = max(self.steps.get(name, 0.0), _largest(apart))
        if node not in self.allowed:
            self.allowed[node] = self.within + _last_bits(node, dtype)
        off = int((~(apart <= self.allowed[node])).sum())  # NaN is off
        if off:
            self.off[name] = self.off.get(name, 0) + off

    def check(self, nodes: Mapping[str, Node]) -> None:
        if not self.off:
            return
        lines = [
            f"the converted model is not the one that was trained: {self.within:g} steps are allowed of each rounding."
        ]
        for name, off in list(self.off.items())[:_MOST]:
            steps = self.steps[name]
            lines.append(f"  {name} is {steps:.3g} steps off; {off} of its values are further off than allowed")
            lines.append(indent(locate(nodes[name]), "    "))
        lines.append(
            "  Was the prepared model trained, or run with its observers on, after convert_pt2e? Convert it again then."
        )
        raise ConversionError("\n".join(lines))


def _rounded(node: Node) -> Node:
    """The tensor whose rounded values a node has; itself where it rounds nothing."""
    while is_quantize(node) or is_dequantize(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _last_bits(node: Node, dtype: torch.dtype) -> float:
    """Steps that two numbers can be further apart than their integers are: the last bits of both."""
    if not dtype.is_floating_point:
        return 0.0
    parts = bind(node)["quant_max"] - bind(node)["quant_min"] + 1 if is_quantize(node) else _PARTS
    return float(parts * torch.finfo(dtype).eps * max(1, _operators_since_rounding(_rounded(node))))


def _operators_since_rounding(last: Node) -> int:
    """How many operators compute, each on what another computed, between a rounding, or an input, and this one."""
    depth: dict[Node, int] = {}
    for node in last.graph.nodes:
        begins = node.op != "call_function" or is_dequantize(node)
        before = max((depth[source] for source in node.all_input_nodes), default=0)
        depth[node] = 0 if begins else before + (not is_value_preserving(node))
        if node is last:
            break
    return depth[last]


def _largest(apart: Tensor) -> float:
    return float(apart.max()) if apart.numel() else 0.0


def _output_nodes(converted: GraphModule) -> list[Node]:
    record = record_of(converted)
    if record is None or record.stage != "converted":
        raise ConversionError("the second argument of check_converted is what convert_pt2e returned")
    found = [leaf for leaf in pytree.tree_leaves(converted.graph.output_node().args[0]) if isinstance(leaf, Node)]
    return [node for node in found if isinstance(node.meta.get("val"), Tensor)]


def _tensors(leaves: list[Any]) -> list[Tensor]:
    return [leaf.double() for leaf in leaves if isinstance(leaf, Tensor)]


def _step(node: Node, values: Tensor) -> float:
    grid = Grid.of_value(node)
    if grid is not None:
        return grid.scale
    ends = torch.aminmax(values)
    return float(ends.max - ends.min) / _PARTS or 1.0
