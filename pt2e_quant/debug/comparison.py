"""Comparison: what `compare` found, as values, text and JSON."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from ..ops import is_dequantize, is_quantize
from ..plain import to_plain
from ..where import module_path, source_line
from .error_sums import ErrorSums

__all__ = ["Comparison", "NodeError", "OutputError"]

_SHOWN = 10


@dataclass(frozen=True)
class NodeError:
    """One tensor of the float model and its version in the other one, over all batches. All SQNR in dB.

    node:      name in the float graph
    found:     name in the other graph: of the dequantize where the tensor is quantized
    op:        operator of the float graph
    module:    path of its module; None where export recorded none
    source:    line of the user's code; None where export recorded none
    sqnr:      of the whole error
    own:       of the error with exact inputs: what this op, its weights and the rounding of its result add; NaN where
               it is not known, in a lowered program
    inherited: of what the errors of its inputs change; NaN likewise
    cosine:    of the angle between both versions
    largest, own_largest: largest |error|, in units of the tensor
    """

    node: str
    found: str
    op: str
    module: str | None
    source: str | None
    sqnr: float
    own: float
    inherited: float
    cosine: float
    largest: float
    own_largest: float

    @classmethod
    def of(cls, node: Node, found: str, sums: ErrorSums) -> NodeError:
        """The row of a float node, and of the other graph's node of this name; an observer goes by what it watches,
        and codes by what was quantized to them.
        """
        while node.op == "call_module" or is_quantize(node) or is_dequantize(node):
            node = node.all_input_nodes[0]
        return cls(
            node.name, found, str(node.target) if node.op == "call_function" else node.op,
            module_path(node), source_line(node),
            sums.sqnr, sums.own, sums.inherited, sums.cosine, sums.largest, sums.own_largest,
        )  # fmt: skip

    def __str__(self) -> str:
        places = ", ".join(filter(None, (f"in {self.module!r}" if self.module else None, self.source)))
        parts = "" if math.isnan(self.own) else f"own {_db(self.own)}, inherited {_db(self.inherited)}, both "
        numbers = f"{parts}{_db(self.sqnr)}"
        return f"{self.node} ({self.op}): {numbers}, cosine {self.cosine:.5f}{f'; {places}' if places else ''}"


@dataclass(frozen=True)
class OutputError:
    """One output of the model, by its position among the flat outputs."""

    index: int
    sqnr: float
    cosine: float
    largest: float

    @classmethod
    def of(cls, index: int, sums: ErrorSums) -> OutputError:
        """The row of an output."""
        return cls(index, sums.sqnr, sums.cosine, sums.largest)

    def __str__(self) -> str:
        return f"output {self.index}: {_db(self.sqnr)}, cosine {self.cosine:.5f}, largest error {self.largest:.3g}"


@dataclass(frozen=True)
class Comparison:
    """A model beside its float original.

    nodes:    tensors inside, in the order of the graph; of a lowered program those that its runtime can show, if any
    outputs:  those with floating-point numbers
    unjoined: tensors of the other graph for which the float graph has no counterpart
    remarks:  what could not be seen, and why
    """

    nodes: tuple[NodeError, ...]
    outputs: tuple[OutputError, ...]
    unjoined: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def sqnr(self) -> float:
        """Of the worst output, in dB."""
        return min((output.sqnr for output in self.outputs), default=math.nan)

    def worst(self, count: int | None = None) -> list[NodeError]:
        """The tensors with the largest own errors relative to their values, worst first; NaN before all.

        Of a lowered program, those with the largest errors.
        """
        return sorted(self.nodes, key=_rank)[:count]

    def text(self, count: int = _SHOWN) -> str:
        """The outputs, then the tensors with the largest own errors."""
        lines = list(map(str, self.outputs))
        worst = [row for row in self.worst(count) if row.own != math.inf]
        if worst:
            kind = "errors" if math.isnan(worst[-1].own) else "own errors"
            lines += [f"largest {kind}, of {len(self.nodes)} tensors:", *(f"  {row}" for row in worst)]
        if self.unjoined:
            lines.append(f"{len(self.unjoined)} tensors have no counterpart: {', '.join(self.unjoined[:_SHOWN])}")
        return "\n".join([*lines, *self.remarks])

    def __str__(self) -> str:
        return self.text()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; infinite dB and NaN as None."""
        plain: dict[str, Any] = to_plain(self)
        for row in (*plain["nodes"], *plain["outputs"]):
            row.update(
                {name: None for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
            )
        return plain

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)


def _rank(row: NodeError) -> float:
    value = row.sqnr if math.isnan(row.own) else row.own
    return -math.inf if math.isnan(value) else value


def _db(value: float) -> str:
    return "exact" if value == math.inf else f"{value:.1f} dB"
