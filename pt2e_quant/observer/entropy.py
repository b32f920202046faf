"""Which part of a distribution to quantize: the ends whose quantized distribution diverges least from the true one.

The true distribution P is clipped to the ends, what lies beyond is added to the outermost bins. The quantized one, Q,
spreads what falls into each step of the quantization grid evenly over that step. Both are compared bin by bin:
sum of P log(P / Q). Migacz, "8-bit inference with TensorRT" (GTC 2017); there with equal bins and one threshold for the
magnitude, here with the bins of `float_bins`, both ends, and the scale and zero point that will be used.

Before this: `clipping` closes in on the best candidate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .clipping import Candidates, Cost, Search, narrow, occupied

__all__ = ["entropy_range"]

_MANY_LEVELS = 4096
_FINEST = 2.0**-11  # what is nearer to zero, in units of the largest magnitude, is one bin: as fine as 2048 equal bins
_ROUGH = 8  # bins that are one in the first look
_TOGETHER = 1 << 16  # elements of a table of candidates by bins or levels that are worked on at once


def entropy_range(counts: Tensor, edges: Tensor, search: Search) -> tuple[float, float]:
    """The ends with the smallest divergence. Arguments as in `clipping.lp_range`."""
    levels = search.quant_max - search.quant_min + 1
    if levels > _MANY_LEVELS or not int(counts.sum()):
        return search.low, search.high
    counts, edges = occupied(counts, edges, search)
    below = torch.nn.functional.pad(counts.cumsum(0) / counts.sum(), (1, 0))
    edges = edges / search.largest
    told_apart = edges.abs() >= _FINEST
    told_apart[0] = told_apart[-1] = True
    below, edges = below[told_apart], edges[told_apart]

    def cost(every: int) -> Cost:
        some, outline = (torch.cat((part[:-1:every], part[-1:])) for part in (edges, below))

        def divergence(candidates: Candidates) -> Tensor:
            at_once = max(1, _TOGETHER // max(some.numel(), levels))
            parts = zip(*(part.split(at_once) for part in vars(candidates).values()), strict=True)
            return torch.cat([_divergence(outline, some, Candidates(*part), levels) for part in parts])

        return divergence

    return narrow(search, cost(_ROUGH), cost(1))


def _divergence(below: Tensor, edges: Tensor, grids: Candidates, levels: int) -> Tensor:
    """sum of P log(P / Q) for each candidate; `below` is the cumulated share of values at each edge."""
    borders = (grids.first - 0.5 + torch.arange(levels + 1, dtype=torch.float64)) * grids.scale
    first, last = borders[:, :1], borders[:, -1:]
    at_borders = _interpolate(borders, edges, below)
    inside = at_borders[:, -1:] - at_borders[:, :1]
    # Q: linear in between the borders. Then P: the same bins, what is clipped added to the outermost ones.
    position = ((edges / grids.scale) - (grids.first - 0.5)).clamp(min=0.0)
    position = torch.minimum(position, torch.full_like(position, float(levels)))
    step = position.floor().clamp_(max=levels - 1).long()
    left, right = at_borders.gather(1, step), at_borders.gather(1, step + 1)
    quantized = (left + (position - step) * (right - left)).diff(dim=1) / inside
    kept = torch.minimum(torch.maximum(edges, first), last)
    true = _interpolate(kept, edges, below).diff(dim=1)
    held = (kept.diff(dim=1) > 0.0).long()
    lowest, highest = held.argmax(1, keepdim=True), held.shape[1] - 1 - held.flip(1).argmax(1, keepdim=True)
    true = true.scatter_add(1, lowest, at_borders[:, :1]).scatter_add(1, highest, 1.0 - at_borders[:, -1:])
    terms = torch.where(true > 0.0, true * (true / quantized.clamp(min=1e-30)).log(), 0.0)
    return torch.where(inside.squeeze(1) > 0.0, terms.sum(1), torch.inf)


def _interpolate(x: Tensor, edges: Tensor, values: Tensor) -> Tensor:
    """The piecewise linear function through (edges, values), constant outside."""
    right = torch.searchsorted(edges, x.contiguous()).clamp_(1, edges.numel() - 1)
    left = right - 1
    share = ((x - edges[left]) / (edges[right] - edges[left])).clamp_(0.0, 1.0)
    return values[left] + share * (values[right] - values[left])
