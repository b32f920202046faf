"""Which part of a distribution to quantize: the ends with the smallest sum of |error|^p.

Values count as spread evenly over their bin. With Q(x) the nearest point of the quantization grid, the error of a bin
[a, b] is its density times the integral of |x - Q(x)|^p, which has a closed antiderivative: with y = x / scale,
n = round(y) clamped to the bounds of q, and r = y - n,

    F(y) = n * 2 * 0.5^(p+1) / (p+1) + sign(r) |r|^(p+1) / (p+1)        integral = scale^(p+1) * (F(b) - F(a))

Neighbouring bins share an edge, so the error of a candidate is one sum over edges of F times the step in density there:
rounding and clipping, fine bins and wide ones alike, in six operations an edge, for all candidates at once.

`narrow` looks over candidates on a coarse grid of both ends and closes in on the best ones. Candidates are judged by
the scale and the integer zero point that they will really get.

Before this: `float_bins` counts. After it: `distribution` hands the range to `qparams`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

__all__ = ["Candidates", "Cost", "Search", "lp_range", "narrow", "occupied"]


@dataclass(frozen=True)
class Search:
    """Everything but the ends that a candidate's scale and zero point follow from.

    low, high: smallest and largest value seen, low < high
    quant_min, quant_max: bounds of q, both included
    eps: smallest scale
    middle: zero point of a symmetric scheme; None for an affine one
    """

    low: float
    high: float
    quant_min: int
    quant_max: int
    eps: float
    middle: int | None

    @property
    def largest(self) -> float:
        return max(-self.low, self.high)

    @property
    def free_ends(self) -> int:
        """1 where one end is zero, which all ranges hold, or where one follows from the other."""
        return 1 if self.middle is not None or self.low >= 0.0 or self.high <= 0.0 else 2


@dataclass(frozen=True)
class Candidates:
    """Ranges [low, high] to choose from, in units of the largest magnitude, and the quantization grid of each.

    first, last: integer multiples of scale at the ends of the grid. All float32, of shape (n, 1).
    """

    low: Tensor
    high: Tensor
    scale: Tensor
    first: Tensor
    last: Tensor


Cost = Callable[[Candidates], Tensor]

_COARSE = 0.75  # ratio of neighbouring candidates in the first look
_DEPTH = 24  # candidates of each end in the first look: down to 0.75^23, a 750th
_STARTS = 3  # of the best coarse candidates, as many are followed up
_ZOOM = {1: 25, 2: 9}  # candidates of each end in each closer look, when this many ends are free
_ROUGH = 8  # bins that are one in the first look: eight an octave
_NOTHING = 2.0**-60  # bins this close to zero, in units of the largest magnitude, have no error worth adding up
_FINEST = 1.005  # a closer look stops when neighbours differ by less


def lp_range(counts: Tensor, edges: Tensor, search: Search, p: float) -> tuple[float, float]:
    """The ends with the smallest sum of |error|^p.

    Args:
        counts: int64, one per bin, without those of exact zeros.
        edges: float64, one more than bins, ascending.
        search: range, bounds and scheme.
        p: exponent of the error.
    """
    counts, edges = occupied(counts, edges, search)
    edges = edges / search.largest
    counts = counts.where(edges[1:].abs().maximum(edges[:-1].abs()) > _NOTHING, 0)

    def cost(coarsest: int) -> Cost:
        lines, steps = _density_steps(*_merged(counts, edges, coarsest))
        return lambda candidates: _errors(lines, steps, candidates, p)

    return narrow(search, cost(_ROUGH), cost(1))


def occupied(counts: Tensor, edges: Tensor, search: Search) -> tuple[Tensor, Tensor]:
    """Bins from the first to the last with data, their outer edges moved to the smallest and the largest value."""
    filled = counts.nonzero()
    if not filled.numel():  # nothing but zeros
        return counts[:0], edges[:0]
    first, last = int(filled[0]), int(filled[-1]) + 1
    edges = edges[first : last + 1].clone()
    edges[0] = max(search.low, edges[0].item())
    edges[-1] = min(search.high, edges[-1].item())
    if edges[0] >= edges[1]:  # the value is the edge of its bin; a bin needs a width
        edges[0] = edges[1] - edges[1].abs() * 2**-10
    if edges[-2] >= edges[-1]:
        edges[-2] = edges[-1] - edges[-1].abs() * 2**-10
    return counts[first:last], edges


def narrow(search: Search, rough: Cost, exact: Cost) -> tuple[float, float]:
    """The ends of the best candidate: by `rough` on a coarse grid, then by `exact` in closer and closer looks."""
    if search.largest / (search.quant_max - search.quant_min) <= search.eps:
        return search.low, search.high  # no candidate has a scale above the smallest
    below = above = torch.ones(1, dtype=torch.float32)  # shares of the lower and of the upper end
    cost, kept = rough, _STARTS
    for steps in _looks(search.free_ends):
        below, above = _around(search, below, above, steps)
        costs = cost(_candidates(search, below, above))
        best = costs.argsort(stable=True)[:kept]
        below, above = below[best], above[best]
        cost, kept = exact, 1
    found = _candidates(search, below, above)
    return found.low.item() * search.largest, found.high.item() * search.largest


@cache
def _looks(ends: int) -> list[Tensor]:
    """By what to multiply the best shares so far, in each look, when this many ends are free."""
    looks = [torch.pow(_COARSE, torch.arange(_DEPTH, dtype=torch.float32))]
    spread = 1.0 / _COARSE
    while spread > _FINEST:
        looks.append(torch.pow(spread, torch.linspace(-1.0, 1.0, _ZOOM[ends], dtype=torch.float32)))
        spread **= 2.0 / (_ZOOM[ends] - 1)
    return looks


def _around(search: Search, below: Tensor, above: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of shares of both ends, at most 1; only of one where the other end is zero or follows from it."""
    if search.free_ends == 1:
        shares = (torch.minimum(below, above).unsqueeze(1) * steps).flatten().clamp_(max=1.0)
        return shares, shares
    below, above = below[:, None, None] * steps[:, None], above[:, None, None] * steps
    below, above = torch.broadcast_tensors(below.clamp_(max=1.0), above.clamp_(max=1.0))
    return below.flatten(), above.flatten()


def _candidates(search: Search, below: Tensor, above: Tensor) -> Candidates:
    """The grids that `qparams.affine_qparams` makes of these shares of both ends."""
    steps, eps = search.quant_max - search.quant_min, min(search.eps / search.largest, 1e30)
    if search.middle is not None:
        low, high, scale = above.neg(), above, (2.0 / steps * above).clamp(min=eps)
        zero_point = torch.full_like(above, search.middle)
    else:
        low, high = below * (min(search.low, 0.0) / search.largest), above * (max(search.high, 0.0) / search.largest)
        scale = ((high - low) / steps).clamp(min=eps)
        zero_point = torch.rsub(torch.round(low / scale), search.quant_min).clamp_(search.quant_min, search.quant_max)
    parts = (low, high, scale, torch.rsub(zero_point, search.quant_min), torch.rsub(zero_point, search.quant_max))
    return Candidates(*(part.unsqueeze(1) for part in parts))


def _merged(counts: Tensor, edges: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """Every `neighbours` bins as one."""
    if neighbours == 1 or counts.numel() <= neighbours:
        return counts, edges
    starts = torch.arange(0, counts.numel(), neighbours)
    padded = torch.nn.functional.pad(counts, (0, -counts.numel() % neighbours))
    return padded.reshape(-1, neighbours).sum(1), torch.cat((edges[starts], edges[-1:]))


def _density_steps(counts: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """Edges where the density changes, and by how much it falls there."""
    density = torch.nn.functional.pad(counts / edges.diff(), (1, 1))
    steps = density[:-1] - density[1:]
    changes = steps.nonzero().squeeze(1)
    return edges[changes].float(), steps[changes].float()


def _errors(lines: Tensor, steps: Tensor, candidates: Candidates, p: float) -> Tensor:
    """Sum of |error|^p for each candidate.

    float32 is enough: an edge is at most 1/64 from its neighbour, so differences of F lose two digits, not more.
    """
    y = lines / candidates.scale
    n = y.round()
    torch.maximum(n, candidates.first, out=n)
    torch.minimum(n, candidates.last, out=n)
    r = y.sub_(n)
    power = (r * r).mul_(r) if p == 2.0 else r.abs().pow_(p + 1.0).copysign_(r)
    antiderivative = power.div_(p + 1.0).add_(n, alpha=2.0 * 0.5 ** (p + 1.0) / (p + 1.0))
    return (antiderivative @ steps) * candidates.scale.squeeze(1).double() ** (p + 1.0)
