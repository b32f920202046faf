"""compare_lsb: a converted graph, its integer reference and a runtime side by side, in steps of each output's grid.

Outputs say whether the three agree. Where graph and reference do not, the quantized tensors inside say where it began.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..checks import checked
from ..errors import CaptureError, QuantizationError
from ..graph.run import Arguments, batches_of, values_of
from ..grid import Grid
from ..pt2e.record import record_of
from ..pt2e.representation import reference_representation_rewrite
from ..sqnr import decibels, power
from ..where import locate

__all__ = ["Differences", "LsbComparison", "OutputComparison", "TensorComparison", "compare_lsb"]

_Q = torch.ops.quantized_decomposed


@runtime_checkable
class Runs(Protocol):
    """What lowering returns: takes the model's arguments and gives its outputs, flat."""

    def run(self, *args: Any, **kwargs: Any) -> Sequence[Any]: ...


@dataclass(frozen=True)
class Differences:
    """Two versions of one tensor, first minus second.

    pair:      names of the two
    count:     values compared
    histogram: how many values differ by how many LSB (steps of the grid); empty for a tensor without a grid
    largest:   largest |difference| in LSB, or in units of the tensor where there is no grid
    first:     (batch, then index in the tensor) of the first value off by more than 1 LSB, or by any where none is
    sqnr:      signal-to-quantization-noise ratio, in dB; only for a tensor without a grid, infinite where both agree
    """

    pair: tuple[str, str]
    count: int
    histogram: dict[int, int]
    largest: float
    first: tuple[int, ...] | None
    sqnr: float | None = None

    def within(self, lsb: int) -> float:
        """Share of values, from 0 to 1, that differ by at most so many LSB; 1 for no values."""
        inside = sum(count for difference, count in self.histogram.items() if abs(difference) <= lsb)
        return inside / self.count if self.count else 1.0

    def __str__(self) -> str:
        name = " - ".join(self.pair)
        if self.sqnr is not None:
            return f"{name}: no grid; largest difference {self.largest:.3g}, {self.sqnr:.1f} dB{self._first()}"
        counts = ", ".join(f"{difference:+d}: {count}" for difference, count in sorted(self.histogram.items()))
        shares = f"equal {self.within(0):.4%}, within 1 LSB {self.within(1):.4%}"
        return f"{name}: {shares}, largest {self.largest:g} LSB ({counts}){self._first()}"

    def _first(self) -> str:
        return "" if self.first is None else f"; first at batch {self.first[0]}, {list(self.first[1:])}"


@dataclass(frozen=True)
class OutputComparison:
    """One output of the model. `grid` is None where nothing quantizes it."""

    index: int
    node: str
    grid: Grid | None
    differences: tuple[Differences, ...]


@dataclass(frozen=True)
class TensorComparison:
    """One quantized tensor inside: converted graph against integer reference.

    node:     the quantize in the converted graph
    location: the op that computes the tensor, its module and its source line
    """

    node: str
    location: str
    differences: Differences


@dataclass(frozen=True)
class LsbComparison:
    """outputs: each output, every pair of versions. tensors: quantized tensors inside, in graph order."""

    outputs: tuple[OutputComparison, ...]
    tensors: tuple[TensorComparison, ...]

    def largest(self) -> float:
        """The largest difference of all outputs with a grid, in LSB."""
        return max((d.largest for o in self.outputs if o.grid is not None for d in o.differences), default=0.0)

    def first_apart(self, lsb: int = 1, share: float = 0.001) -> TensorComparison | None:
        """The first quantized tensor where graph and reference come apart: look there first.

        Where more than `share` of the values differ by more than `lsb`: single roundings that fall to the other side
        add up along a network, and a few values are 2 LSB off without any fault.
        """
        return next((tensor for tensor in self.tensors if 1 - tensor.differences.within(lsb) > share), None)

    def text(self) -> str:
        """Plain text: one block an output, then where graph and reference come apart."""
        lines = []
        for output in self.outputs:
            grid = output.grid
            words = "not quantized" if grid is None else f"scale {grid.scale:.6g}, zero point {grid.zero_point}"
            lines.append(f"output {output.index} ({output.node}): {words}")
            lines += [f"  {differences}" for differences in output.differences]
        apart = self.first_apart()
        if apart is not None:
            lines.append(f"graph and reference come apart at {apart.node}, computed by")
            lines += [f"  {line}" for line in (*apart.location.splitlines(), str(apart.differences))]
        elif self.tensors:
            least = min(tensor.differences.within(1) for tensor in self.tensors)
            lines.append(f"each of {len(self.tensors)} quantized tensors inside: at least {least:.4%} within 1 LSB")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; histograms as lists of [LSB, count], infinite dB as None."""
        plain: dict[str, Any] = asdict(self)
        for output in plain["outputs"]:
            if output["grid"] is not None:
                output["grid"]["dtype"] = str(output["grid"]["dtype"]).removeprefix("torch.")
        each = [d for o in plain["outputs"] for d in o["differences"]] + [t["differences"] for t in plain["tensors"]]
        for differences in each:
            differences["histogram"] = sorted(map(list, differences["histogram"].items()))
            if differences["sqnr"] is not None and math.isinf(differences["sqnr"]):
                differences["sqnr"] = None
        return plain

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)


@checked(CaptureError)
def compare_lsb(
    converted: GraphModule,
    reference: GraphModule | None,
    runtime: Runs | Sequence[Sequence[Tensor]] | None,
    batches: Iterable[Any],
) -> LsbComparison:
    """Run all versions of one model on the same inputs and count how many steps of their grids they are apart.

    Args:
        converted: what convert_pt2e returned.
        reference: the same in integer arithmetic; None makes it.
        runtime: a lowered program with `run`, or its outputs (a sequence of tensors a batch); None leaves it out.
        batches: what to run them on, as `graph.run.batches_of` takes it.

    Raises:
        CaptureError: a model is no graph.
        CalibrationError: there is no batch.
        QuantizationError: the versions have different outputs.
    """
    if not isinstance(converted, GraphModule) or not isinstance(reference, GraphModule | None):
        raise CaptureError("compare_lsb takes graphs: what convert_pt2e returned, and its integer reference or None")
    reference = reference_representation_rewrite(converted) if reference is None else reference
    held = list(batches_of(batches, "compare_lsb"))
    record = record_of(reference)
    inside = record.representation.codes if record is not None and record.representation is not None else {}
    versions = {
        "converted": [values_of(converted, batch, set(inside)) for batch in held],
        "reference": [values_of(reference, batch, {*inside.values()}) for batch in held],
    }
    if runtime is not None:
        versions["runtime"] = [(list(outputs), {}) for outputs in _run_outside(runtime, held)]
    return LsbComparison(_outputs(converted, versions), _tensors(converted, inside, versions))


_Versions = list[tuple[list[Any], dict[str, Tensor]]]
"""For each batch: the outputs, flat, and the tensors asked for by the names of their nodes."""


def _run_outside(runtime: Runs | Sequence[Sequence[Tensor]], batches: Sequence[Arguments]) -> Sequence[Sequence[Any]]:
    if isinstance(runtime, Runs):
        return [[value.clone() for value in runtime.run(*args, **kwargs)] for args, kwargs in batches]
    if len(runtime) != len(batches):
        raise QuantizationError(f"the runtime's outputs are those of {len(runtime)} batches, there are {len(batches)}")
    return runtime


# --- outputs ----------------------------------------------------------------------------------------------------------


def _outputs(converted: GraphModule, versions: dict[str, _Versions]) -> tuple[OutputComparison, ...]:
    nodes = converted.graph.output_node().args[0]
    record = record_of(converted)
    counts = {name: {len(outputs) for outputs, _ in runs} for name, runs in versions.items()}
    if len(set().union(*counts.values())) != 1:
        raise QuantizationError(f"the versions have different numbers of outputs: {counts}")
    found = []
    for index, node in enumerate(nodes):  # type: ignore[arg-type]
        if not isinstance(node, Node):
            continue
        grid = Grid.of_value(node) or (record.outputs.get(index) if record is not None else None)
        values = {name: [outputs[index] for outputs, _ in runs] for name, runs in versions.items()}
        found.append(OutputComparison(index, node.name, grid, _pairs(values, grid)))
    return tuple(found)


def _pairs(values: dict[str, list[Any]], grid: Grid | None) -> tuple[Differences, ...]:
    names = list(values)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    return tuple(_differences((a, b), values[a], values[b], None if grid is None else grid.scale) for a, b in pairs)


def _tensors(
    converted: GraphModule, inside: dict[str, str], versions: dict[str, _Versions]
) -> tuple[TensorComparison, ...]:
    nodes = {node.name: node for node in converted.graph.nodes}
    order = [name for name in nodes if name in inside]
    found = []
    for name in order:
        ours = [kept[name] for _, kept in versions["converted"]]
        theirs = [kept[inside[name]] for _, kept in versions["reference"]]
        computed = nodes[name].all_input_nodes[0]
        differences = _differences(("converted", "reference"), ours, theirs, 1.0)
        found.append(TensorComparison(name, locate(computed), differences))
    return tuple(found)


# --- numbers ----------------------------------------------------------------------------------------------------------


def _differences(
    pair: tuple[str, str], first: Sequence[Any], second: Sequence[Any], scale: float | None
) -> Differences:
    """Of one tensor over all batches. Integers differ by whole LSB already, real numbers are divided by the scale."""
    apart = [_subtract(pair, a, b) for a, b in zip(first, second, strict=True)]
    count = sum(difference.numel() for difference in apart)
    if scale is None:
        largest = max((float(d.abs().max()) for d in apart if d.numel()), default=0.0)
        return Differences(
            pair, count, {}, largest, _first([d != 0 for d in apart]), decibels(power(first), power(apart))
        )
    integers = not first[0].is_floating_point()
    steps = [(difference if integers else difference / scale).round().long() for difference in apart]
    histogram: Counter[int] = Counter()
    for step in steps:
        values, counts = step.unique(return_counts=True)
        histogram.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    where = _first([step.abs() > 1 for step in steps])
    where = _first([step != 0 for step in steps]) if where is None else where
    return Differences(pair, count, dict(sorted(histogram.items())), max(map(abs, histogram), default=0), where)


def _subtract(pair: tuple[str, str], a: Any, b: Any) -> Tensor:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
        shapes = " and ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else repr(x) for x in (a, b))
        raise QuantizationError(f"an output of {pair[0]} and of {pair[1]} cannot be compared: {shapes}")
    return a.double() - b.double()


def _first(masks: Sequence[Tensor]) -> tuple[int, ...] | None:
    for batch, mask in enumerate(masks):
        if mask.any():
            return (batch, *mask.nonzero()[0].tolist())
    return None
