"""Range setting: of several ranges for each observed tensor, the one with the smallest error where it is used.

No one rule fits all tensors: an outlier that min-max keeps costs steps, one that a search of the tensor's own mean
square error (Choukroun et al., Low-bit Quantization of Neural Networks for Efficient Inference, ICCV workshops 2019,
arXiv:1902.06822) or a percentile cuts off may be what the next layer looks at. Candidates come from what calibration
has counted; each is judged by the error of what the next layer returns (its own and the one behind it, a window of two
blocks of `blocks`), behind all that was chosen before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..checks import checked
from ..debug.pairs import observes
from ..errors import CaptureError
from ..graph.attributes import attribute
from ..graph.module import ExportedModule, finish
from ..graph.run import on_batch
from ..observer import FixedQParamsObserver, ObserverBase
from ..observer.derived import DerivedObserver
from ..progress import counted
from ..pt2e.observed import QParams
from ..qparams import affine_qparams
from .blocks import Block, blocks_of
from .rounding import rounded
from .sites import settle, sites_of, working_copy
from .stream import Stream

__all__ = ["Ranged", "choose_ranges"]

_SHARES = (0.9, 0.8, 0.7, 0.6, 0.5)
_PERCENTILES = (0.999, 0.9999)


@dataclass(frozen=True)
class Ranged:
    """What became of the range of one tensor, or of several that share it.

    Args:
        tensor: name of the node that makes it.
        choice: 'as calibrated', 'min-max', 'percentile 99.9', '0.8 of the range', ...
        low, high: smallest and largest real number of the grid.
        gain: power of the error behind it, before over after.
    """

    tensor: str
    choice: str
    low: float
    high: float
    gain: float

    def __str__(self) -> str:
        return f"{self.tensor}: {self.choice}, [{self.low:.4g}, {self.high:.4g}], error divided by {self.gain:.2f}"


@checked(CaptureError)
def choose_ranges(prepared: GraphModule, data: Iterable[Any]) -> tuple[ExportedModule, list[Ranged]]:
    """Choose the range of each activation with one static scale.

    Args:
        prepared: what `prepare_pt2e` returned, calibrated; it stays as it was. Symmetric grids stay symmetric, and
            tensors that share a grid go on sharing it; it is judged where the first of them is used.
        data: batches, as `graph.run.batches_of` takes them; two or three are enough. A range other than the calibrated
            one has to be better on each of them: what gains on some alone would be lost on others.

    Returns:
        The prepared graph with settled ranges, to be converted like the original, and what was chosen.

    Raises:
        CaptureError: `prepared` is no such graph, or writes to its buffers.
        CalibrationError: there is no batch, or the model fails on one.
    """
    asked_by = "choose_ranges(prepared, data)"
    gm = working_copy(prepared, asked_by)
    stream = Stream(gm, data, asked_by)
    before, blocks = blocks_of(gm, sites_of(gm)[0], "layer")
    stream.advance(before)
    done: dict[str, Ranged] = {}
    for block, following in zip(counted(blocks, "choosing ranges"), [*blocks[1:], None], strict=True):
        nodes = block.nodes if following is None else (*block.nodes, *following.nodes)
        window = _Window(stream, Block(block.name, nodes, ()))
        for node in block.computed:
            name = str(node.target)
            if name not in done and observes(gm, node) and (own := _open_grid(gm, name, stream)) is not None:
                done[name] = window.choose(node, name, own)
        stream.advance(block.nodes)
    return finish(gm), list(done.values())


def _open_grid(gm: GraphModule, name: str, stream: Stream) -> QParams | None:
    """The grid of an observer where it may be another one: static integers with one scale."""
    if isinstance(attribute(gm, name), DerivedObserver | FixedQParamsObserver):
        return None
    qparams = stream.grid(name)
    if qparams is None or qparams.is_cast or qparams.scale is None or qparams.scale.numel() != 1:
        return None
    return None if qparams.dtype.is_floating_point else qparams


class _Window:
    """A block and the one behind it, with the inputs and goals of all batches."""

    def __init__(self, stream: Stream, block: Block) -> None:
        self._stream, self._block = stream, block
        lanes = stream.lanes
        with torch.no_grad(), on_batch(stream.gm, "the prepared graph"):
            exact = [{node: lane.exact[node] for node in block.sources} for lane in lanes]
            self._goals = [block.run_exact(stream, inputs) for inputs in exact]
        self._inputs = [{node: lane.rounded[node] for node in block.sources} for lane in lanes]

    def choose(self, node: Node, name: str, own: QParams) -> Ranged:
        """Settle an observer on the grid with the smallest error."""
        gm = self._stream.gm
        before = self._errors(name, own)
        tried = [("as calibrated", own, before)]
        for word, one in _candidates(attribute(gm, name), own):
            errors = self._errors(name, one)
            if all(error < known for error, known in zip(errors, before, strict=True)):
                tried.append((word, one, errors))
        word, best, errors = min(tried, key=lambda one: sum(one[2]))
        if best is not own:
            settle(gm, name, best.scale, best.zero_point)  # type: ignore[arg-type]  # static grids have both
            self._stream.forget_grid(name)
        return Ranged(str(node.args[0]), word, *_ends(best), sum(before) / sum(errors) if sum(errors) else 1.0)

    def _errors(self, chosen: str, qparams: QParams) -> list[float]:
        """Of each batch, the power of the error behind an observer that rounds so."""

        def through(node: Node, name: str, value: Tensor) -> Tensor:
            return rounded(value, qparams) if name == chosen else self._stream.round(node, name, value)

        with torch.no_grad():
            found = [self._block.run(self._stream, inputs, through) for inputs in self._inputs]
        return list(map(_difference, found, self._goals))


def _difference(found: list[Any], goals: list[Any]) -> float:
    pairs = [(one, goal) for one, goal in zip(found, goals, strict=True) if isinstance(one, Tensor)]
    return sum(float((one - goal).double().square().sum()) for one, goal in pairs if one.is_floating_point())


def _candidates(observer: Any, own: QParams) -> Iterator[tuple[str, QParams]]:
    low, high = _ends(own)
    counts = observer.counted() if isinstance(observer, ObserverBase) else None
    if counts is not None and len(counts[0]):
        values, times = counts
        low, high = float(values[0]), float(values[-1])
        yield "min-max", _mapped(own, low, high)
        for share in _PERCENTILES:
            yield f"percentile {share:.2%}".replace("%", ""), _mapped(own, *_cut(values, times, share))
    for share in _SHARES:
        yield f"{share} of the range", _mapped(own, share * low, share * high)


def _cut(values: Tensor, times: Tensor, share: float) -> tuple[float, float]:
    """The ends of the middle part of the values, as large as `share`."""
    part = times.double().cumsum(0) / times.sum()
    first = int(torch.searchsorted(part, (1 - share) / 2))
    last = int(torch.searchsorted(part, (1 + share) / 2))
    return float(values[min(first, len(values) - 1)]), float(values[min(last, len(values) - 1)])


def _mapped(own: QParams, low: float, high: float) -> QParams:
    bounds = (own.quant_min, own.quant_max)
    middle = int(own.zero_point) if own.symmetric else None  # type: ignore[arg-type]  # static grids have one
    scale, zero_point = affine_qparams(
        low, high, *bounds, dtype=own.dtype, symmetric=own.symmetric, eps=own.eps, zero_point=middle
    )
    return replace(own, scale=scale.reshape(1), zero_point=zero_point.reshape(1))


def _ends(grid: QParams) -> tuple[float, float]:
    scale, zero_point = float(grid.scale), float(grid.zero_point)  # type: ignore[arg-type]  # static grids have both
    return (grid.quant_min - zero_point) * scale, (grid.quant_max - zero_point) * scale
