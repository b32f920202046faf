"""Effects: what quantizing single layers does to the outputs of a model, as a ranked table and as a plot."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import QuantizationError
from ..plain import to_plain
from ..where import module_path, source_line
from .layers import Layer

__all__ = ["Effects", "LayerEffect", "Mode"]

Mode = Literal["first order", "alone", "without"]


@dataclass(frozen=True)
class LayerEffect:
    """One layer: an op with what is rounded together with it.

    layer:  name of the op in the exported program, as selectors of a quantizer take it
    nodes:  the nodes of the float graph that belong to it
    op, module, source: its operator, module and line of the user's code; None where export recorded none
    value:  what was measured: SQNR of the outputs in dB, or the metric of the user
    """

    layer: str
    nodes: tuple[str, ...]
    op: str
    module: str | None
    source: str | None
    value: float

    @classmethod
    def of(cls, layer: Layer, value: float) -> LayerEffect:
        """The row of a layer."""
        first = layer.nodes[0]
        names = tuple(node.name for node in layer.nodes)
        return cls(layer.name, names, str(first.target), module_path(first), source_line(first), value)


@dataclass(frozen=True)
class Effects:
    """What quantizing each layer does.

    mode:     'first order': estimated, the layer quantized alone; 'alone': measured; 'without': all layers but this one
              are quantized
    metric:   what the values are: 'SQNR in dB', or the name of the user's function
    baseline: the value of the float model, of the quantized one for 'without'
    layers:   the one that costs most first
    """

    mode: Mode
    metric: str
    baseline: float
    layers: tuple[LayerEffect, ...]

    @classmethod
    def ranked(cls, mode: Mode, metric: str, baseline: float, layers: list[LayerEffect]) -> Effects:
        """The layers in order: alone, the lowest value first; without one, the highest."""
        sign = -1 if mode == "without" else 1
        order = sorted(layers, key=lambda row: -math.inf if math.isnan(row.value) else sign * row.value)
        return cls(mode, metric, baseline, tuple(order))

    def values(self) -> dict[str, float]:
        """The value of each layer by its name."""
        return {row.layer: row.value for row in self.layers}

    def text(self, count: int | None = None) -> str:
        """A ranked table."""
        lines = [f"{self._title}:"]
        width = max((len(row.layer) for row in self.layers[:count]), default=0)
        for row in self.layers[:count]:
            places = ", ".join(filter(None, (f"in {row.module!r}" if row.module else None, row.source)))
            lines.append(f"  {row.layer:{width}}  {row.value:10.4g}  {' + '.join(row.nodes)}; {places}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text()

    @property
    def _title(self) -> str:
        kinds = {"first order": "one layer quantized, first order", "alone": "one layer quantized"}
        kind = kinds.get(self.mode, "one layer in float, all others quantized")
        baseline = f" (baseline {self.baseline:.4g})" if math.isfinite(self.baseline) else ""
        return f"{self.metric} with {kind}{baseline}"

    def plot(self, axes: Any = None) -> Any:
        """Bars, the costliest layer on top. Returns matplotlib's Axes; `axes` are those to draw on.

        Raises:
            QuantizationError: matplotlib is missing.
        """
        axes = _axes(len(self.layers)) if axes is None else axes
        finite = [row for row in reversed(self.layers) if math.isfinite(row.value)]
        axes.barh([row.layer for row in finite], [row.value for row in finite])
        axes.set_xlabel(self.metric)
        axes.set_title(self._title)
        axes.figure.tight_layout()
        return axes

    def to_json(self) -> str:
        """Everything, as JSON; infinite values and NaN as None."""
        plain = to_plain(self)
        for row in (plain, *plain["layers"]):
            row.update({key: None for key, one in row.items() if isinstance(one, float) and not math.isfinite(one)})
        return json.dumps(plain, indent=1)


def _axes(rows: int) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise QuantizationError(
            "plots need matplotlib, which the extra 'plots' installs: pip install 'pt2e-quant[plots]'"
        ) from missing
    return Figure(figsize=(8, 1 + 0.25 * rows)).subplots()
