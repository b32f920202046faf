"""What a prepared or converted graph remembers of how it came about, as plain values.

Kept in `gm.meta["pt2e_quant"]`, it holds names instead of nodes, so that it survives deepcopy and pickling. `report`
turns it into something to read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch.fx import GraphModule

__all__ = ["RECORD_KEY", "Decision", "GroupRecord", "PointRecord", "Record", "record_of"]

RECORD_KEY = "pt2e_quant"


@dataclass(frozen=True)
class Decision:
    """What became of one op of the model: quantized by a rule, or left in float for a reason."""

    node: str
    op: str
    quantized: bool
    rule: str | None
    reason: str | None
    inputs: dict[str, str]
    output: str | None
    module: str | None
    source: str | None


@dataclass(frozen=True)
class PointRecord:
    """One tensor at its producer, the consumers that see it quantized, and the observer that watches it."""

    producer: str
    consumers: tuple[str, ...]
    observer: str
    constant: bool
    location: str


@dataclass
class GroupRecord:
    """Tensors that share one observer. `scale` and `zero_point` are known after convert; lists when per channel."""

    observer: str
    kind: str
    spec: str
    members: tuple[str, ...]
    scale: float | list[float] | None = None
    zero_point: float | list[float] | None = None


@dataclass
class Record:
    """The whole account of one graph."""

    stage: Literal["prepared", "converted"]
    quantizer: str
    decisions: list[Decision]
    points: list[PointRecord]
    groups: list[GroupRecord]
    unused_rules: list[str]
    folded: list[str] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int | None = None
    example_inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    @property
    def quantized(self) -> list[Decision]:
        return [decision for decision in self.decisions if decision.quantized]

    @property
    def skipped(self) -> list[Decision]:
        return [decision for decision in self.decisions if not decision.quantized]


def record_of(model: object) -> Record | None:
    """The record of a prepared or converted graph, None for any other object."""
    meta = model.meta if isinstance(model, GraphModule) else {}
    record = meta.get(RECORD_KEY)
    return record if isinstance(record, Record) else None
