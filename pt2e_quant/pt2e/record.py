"""What a prepared or converted graph remembers of how it came about, as plain values.

Kept in `gm.meta["pt2e_quant"]`, it holds names instead of nodes, so that it survives deepcopy and pickling. `report`
turns it into something to read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule

__all__ = ["RECORD_KEY", "BorderQParams", "Decision", "GroupRecord", "PointRecord", "Record", "record_of"]

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


@dataclass(frozen=True)
class BorderQParams:
    """How an integer input, output or buffer of the model stands for real numbers: x = (q - zero_point) * scale."""

    scale: float
    zero_point: int
    quant_min: int
    quant_max: int
    dtype: torch.dtype

    def quantize(self, x: Tensor) -> Tensor:
        """Real numbers -> the integers that the model takes, exactly as its own quantize did it."""
        return torch.ops.quantized_decomposed.quantize_per_tensor.default(x, *self.arguments)  # type: ignore[no-any-return]

    def dequantize(self, q: Tensor) -> Tensor:
        """The integers that the model returns -> float32, exactly as its own dequantize did it."""
        return torch.ops.quantized_decomposed.dequantize_per_tensor.default(q, *self.arguments)  # type: ignore[no-any-return]

    @property
    def arguments(self) -> tuple[float, int, int, int, torch.dtype]:
        """What the q/dq ops take behind the tensor."""
        return self.scale, self.zero_point, self.quant_min, self.quant_max, self.dtype


@dataclass
class Record:
    """The whole account of one graph.

    inputs, outputs: those that convert made integers, by position
    buffers:         those that convert made integers, by name
    state:           what the buffers that the model writes to held before calibration, by name
    """

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
    inputs: dict[int, BorderQParams] = field(default_factory=dict)
    outputs: dict[int, BorderQParams] = field(default_factory=dict)
    buffers: dict[str, BorderQParams] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)

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
