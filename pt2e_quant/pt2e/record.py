"""What a prepared or converted graph remembers of how it came about, as plain values.

Kept in `gm.meta["pt2e_quant"]`, it holds names instead of nodes, so that it survives deepcopy and pickling. `report`
turns it into something to read.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor
from torch.fx import GraphModule

from ..grid import Grid
from ..meta import RECORD_KEY
from ..reasons import Folded

__all__ = [
    "Decision",
    "GroupRecord",
    "Histogram",
    "OutputErrors",
    "PointRecord",
    "Record",
    "Representation",
    "SiteRange",
    "record_of",
]


@dataclass(frozen=True)
class Decision:
    """What became of one op of the model: quantized by a rule, or left in float for a reason.

    rule: the rule that took it, or the quantizer where that has no rules
    inputs, output: specs in words, by the node that computes the tensor
    code: kind of the reason, a key of pt2e_quant.reasons.WAYS_OUT
    origin: the node of the exported program that this one is, or stems from
    overlaps: quantizers that wanted the op as well, after the one that has it
    left: of a quantized op, why tensors that were asked for stay in float
    """

    node: str
    op: str
    quantized: bool
    rule: str | None
    reason: str | None
    inputs: dict[str, str]
    output: str | None
    module: str | None
    source: str | None
    code: str | None = None
    origin: str = ""
    overlaps: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


@dataclass(frozen=True)
class PointRecord:
    """One tensor at its producer, the consumers that see it quantized, and the observer that watches it."""

    producer: str
    consumers: tuple[str, ...]
    observer: str
    constant: bool
    location: str

    def inside(self) -> PointRecord:
        """The same with the names of its own graph; those recorded lead there from the outermost one."""
        consumers = tuple(map(_last, self.consumers))
        return replace(self, producer=_last(self.producer), consumers=consumers, observer=_last(self.observer))


@dataclass(frozen=True)
class SiteRange:
    """What one tensor would take for itself: the values that it had, and the scale that the spec maps them to.

    spread: half of its values lie no further than this from their median, not counting those that equal it
    """

    tensor: str
    low: float
    high: float
    scale: float
    spread: float | None = None


@dataclass(frozen=True)
class Histogram:
    """How often values were seen, in bins of equal width over [low, high]."""

    low: float
    high: float
    counts: tuple[int, ...]


@dataclass
class GroupRecord:
    """Tensors that share one observer. `scale` and `zero_point` are known after convert; lists when per channel.

    observer: name of the observer's submodule
    kind:     kind of the spec: observed, fixed or derived
    members:  'conv2d' for the output of a node, 'x -> conv2d' for one use of x
    range:    smallest and largest real number that the integers stand for; None per channel and for run-time qparams
    dropped:  members whose own spec asked for another observer, each with that observer: uses of one tensor as the
              same integers are quantized once, by the observer of its producer
    own:      ranges of the single tensors, where they were measured: `explain(prepared, data)`
    histogram: what the observer counted, of all its tensors; None where it keeps no counts
    """

    observer: str
    kind: str
    spec: str
    members: tuple[str, ...]
    scale: float | list[float] | None = None
    zero_point: float | list[float] | None = None
    observer_class: str = ""
    range: tuple[float, float] | None = None
    dropped: tuple[str, ...] = ()
    own: tuple[SiteRange, ...] = ()
    histogram: Histogram | None = None


@dataclass(frozen=True)
class OutputErrors:
    """How far the outputs of a calibrated model are from those without rounding, on some data: SQNR in dB.

    static:  with the grids of the calibration
    dynamic: with the inputs of linears and convolutions on the grids of their own values, and no other activation
             rounded
    alone:   where static is poor, with one observer alone rounding, those that cost most, by name
    """

    static: float
    dynamic: float
    alone: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Representation:
    """What became of the ops of a model that was rewritten in integer arithmetic.

    rounding: how sums become codes
    forms:    float ops that are integer ones now, with the type that they compute in
    left:     ops and dequantizes on quantized tensors that stayed in float, with the reason
    codes:    quantize nodes of the converted graph, with the node here that holds the same codes
    grids:    what those codes stand for, by the node here
    """

    rounding: str
    forms: dict[str, str]
    left: dict[str, str]
    codes: dict[str, str]
    grids: dict[str, Grid] = field(default_factory=dict)


@dataclass
class Record:
    """The whole account of one graph.

    inputs, outputs: those that convert made integers, by position
    buffers:         those that convert made integers, by name
    state:           what the buffers that the model writes to held before calibration, by name
    trained:         prepared for training
    output_errors:   where they were measured: `explain(prepared, data)`
    """

    stage: Literal["prepared", "converted"]
    quantizer: str
    decisions: list[Decision]
    points: list[PointRecord]
    groups: list[GroupRecord]
    unused_rules: list[str]
    folded: list[Folded] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int | None = None
    example_inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    inputs: dict[int, Grid] = field(default_factory=dict)
    outputs: dict[int, Grid] = field(default_factory=dict)
    buffers: dict[str, Grid] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    representation: Representation | None = None
    trained: bool = False
    output_errors: OutputErrors | None = None

    def points_by_graph(self) -> dict[str, list[PointRecord]]:
        """The points of each graph by its path ('' is the outermost), with the names that things have inside it."""
        found: dict[str, list[PointRecord]] = defaultdict(list)
        for point in self.points:
            found[point.producer.rpartition(".")[0]].append(point.inside())
        return found

    @property
    def quantized(self) -> list[Decision]:
        return [decision for decision in self.decisions if decision.quantized]

    @property
    def skipped(self) -> list[Decision]:
        return [decision for decision in self.decisions if not decision.quantized]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def record_of(model: object) -> Record | None:
    """The record of a prepared or converted graph, None for any other object."""
    meta = model.meta if isinstance(model, GraphModule) else {}
    record = meta.get(RECORD_KEY)
    return record if isinstance(record, Record) else None
