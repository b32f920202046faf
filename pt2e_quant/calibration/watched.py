"""Which observers of a prepared model learn from calibration data, and what they watch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from ..errors import CalibrationError
from ..graph.attributes import attribute
from ..graph.nested import graphs
from ..observer.derived import DerivedObserver
from ..observer.fixed import FixedQParamsObserver
from ..pt2e.observed import read_observer
from ..pt2e.record import PointRecord, Record, record_of

__all__ = ["Watched", "watched"]


@dataclass(frozen=True)
class Watched:
    """One observer.

    name:    of its submodule
    points:  the tensors that it watches, at least one
    example: what export recorded of one of them, a tensor without values; None where that is not known
    """

    name: str
    observer: nn.Module
    points: tuple[PointRecord, ...]
    example: Tensor | None

    @property
    def tensors(self) -> frozenset[str]:
        """The graph nodes that compute what it watches."""
        return frozenset(point.producer for point in self.points)

    @property
    def location(self) -> str:
        return self.points[0].location


def watched(prepared: GraphModule) -> list[Watched]:
    """The observers that calibration data teaches, in the order of the graph.

    Raises:
        CalibrationError: `prepared` is not what `prepare_pt2e` returned.
    """
    record: Record | None = record_of(prepared)
    if record is None or record.stage != "prepared":
        raise CalibrationError(
            "calibration belongs to a prepared model; pass what prepare_pt2e returned, before it is converted"
        )
    found: dict[str, list[PointRecord]] = {}
    for point in record.points:
        if not point.constant and _learns(attribute(prepared, point.observer)):
            found.setdefault(point.observer, []).append(point)
    examples = _examples(prepared)
    return [
        Watched(name, attribute(prepared, name), tuple(points), examples.get(name)) for name, points in found.items()
    ]


def _learns(observer: nn.Module) -> bool:
    given = isinstance(observer, (DerivedObserver, FixedQParamsObserver)) or read_observer(observer).is_dynamic
    return not given and (
        bool(observer.state_dict()) or any(isinstance(value, Tensor) for value in vars(observer).values())
    )


def _examples(prepared: GraphModule) -> dict[str, Tensor]:
    """By the name of the observer, seen from the outermost graph."""
    found: dict[str, Any] = {}
    for path, gm in graphs(prepared):
        for call in gm.graph.find_nodes(op="call_module"):
            value = getattr(call.args[0], "meta", {}).get("val") if call.args else None
            if isinstance(value, Tensor):
                found.setdefault(f"{path}.{call.target}" if path else str(call.target), value)
    return found
