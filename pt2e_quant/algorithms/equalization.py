"""Cross-layer equalization: channels of neighbouring layers get ranges of one size, so that one scale serves them all.

relu(x / s) s = relu(x) for s > 0: dividing the rows of one weight (and its bias) and multiplying the columns of the
next leaves the model as it is. With s = sqrt(r1 / r2), r1 and r2 the largest magnitudes of a channel in both, both
become sqrt(r1 r2) (Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019,
arXiv:1906.04721, section 4.1), and chains of layers converge. Comes before prepare, needs no data, and pays where
weights have one scale for all channels, or activations channels of very different size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from ..checks import checked
from ..errors import CaptureError
from ..graph.module import ExportedModule, finish, tidy
from ..graph.write import Writer
from .folds import is_relu6
from .layer_pairs import Pair, pairs_of, ready

__all__ = ["Equalized", "equalize"]

_ROUNDS = 40
_ENOUGH = 1e-3
"""Rounds end when no factor is further from 1."""


@dataclass(frozen=True)
class Equalized:
    """What became of the layers that read one tensor, and of that which makes it.

    Args:
        input: name of the tensor's node.
        producer: name of the layer that makes it; None where there is none.
        readers: names of the layers that read it.
        before, after: smallest and largest magnitude of the producer's rows; (0.0, 0.0) where nothing was done.
        reason: why nothing was done; None where something was.
    """

    input: str
    producer: str | None
    readers: tuple[str, ...]
    before: tuple[float, float]
    after: tuple[float, float]
    reason: str | None = None

    def __str__(self) -> str:
        pair = f"{self.producer or self.input} to {', '.join(self.readers)}"
        if self.reason is not None:
            return f"{pair}: left alone ({self.reason})"
        return f"{pair}: channel ranges {_words(self.before)} are now {_words(self.after)}"


def _words(ends: tuple[float, float]) -> str:
    return f"{ends[0]:.3g} to {ends[1]:.3g}"


@checked(CaptureError)
def equalize(
    model: ExportedProgram | GraphModule, *, replace_relu6: bool = False
) -> tuple[ExportedModule, list[Equalized]]:
    """Equalize all pairs of convolutions and linears with relu, pools, pads or moves of values between them.

    Args:
        model: an exported float model in evaluation mode; it stays as it was. Batch norms are folded.
        replace_relu6: let relu take the place of relu6 between two layers, as the paper does. The model is another one
            then wherever values were above 6.

    Returns:
        The equalized graph, to be prepared like the original, and what was done to each pair.

    Raises:
        CaptureError: `model` is no exported model.
    """
    gm = ready(model)
    pairs, reasons = pairs_of(gm, clamps=replace_relu6)
    before = {pair: _ends(pair.row_ranges()) for pair in pairs}
    for _ in range(_ROUNDS):
        if max(map(_equalize, pairs), default=0.0) < _ENOUGH:
            break
    for pair in pairs:
        pair.write(gm)
    _without_relu6(gm, pairs)
    done = [Equalized(x.name, None, tuple(n.name for n in r), (0.0, 0.0), (0.0, 0.0), w) for x, r, w in reasons]
    for pair in pairs:
        names = tuple(node.name for node in pair.readers)
        done.append(Equalized(pair.x.name, pair.producer.name, names, before[pair], _ends(pair.row_ranges())))
    return finish(tidy(gm)), done  # type: ignore[arg-type]  # tidy returns what it was given


def _equalize(pair: Pair) -> float:
    """One step; how far its largest factor is from 1."""
    rows, columns = pair.row_ranges(), pair.column_ranges()
    usable = (rows > 0) & (columns > 0) & rows.isfinite() & columns.isfinite()
    factors = torch.where(usable, (rows / columns.clamp_min(1e-30)).sqrt(), 1.0)
    pair.divide_rows(factors)
    return float((factors.log().abs()).amax()) if factors.numel() else 0.0


def _ends(ranges: Tensor) -> tuple[float, float]:
    return float(ranges.amin()), float(ranges.amax())


def _without_relu6(gm: GraphModule, pairs: list[Pair]) -> None:
    write = Writer(gm, "equalize")
    for node in dict.fromkeys(node for pair in pairs for node in pair.path if is_relu6(node)):
        with write.before(node):
            write.replace(node, write.call(torch.ops.aten.relu.default, node.args[0]))
