"""Observers that keep exact counts of all values in fixed bins, and quantize the range that serves them best.

DistributionObserver      base: counts, smallest and largest value; a subclass chooses the range
MSEObserver               smallest squared error; what the default recipes use
LpNormObserver            smallest sum of |error|^p
PercentileObserver        a share of all values
EntropyObserver           smallest Kullback-Leibler divergence

Unlike the compatible HistogramObserver, counts are exact integers on a grid that never moves (see `float_bins`), the
search works with the bounds of q and the zero point that will be used, and symmetric schemes are searched
symmetrically. Merging observers of any parts of the data, in any order, gives the state of one pass, bit for bit, and
all classes have the same state: one calibration serves each of them.

Before this: `base`, `float_bins`. After it: `clipping` and `entropy` choose the range, `qparams` turns it into a scale.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import checked
from ..errors import SpecError
from ..specs import PER_TENSOR, integer_range, is_symmetric
from .base import UniformQuantizationObserverBase, is_unset, widen
from .batch import remember, take_back
from .clipping import Search, lp_range
from .entropy import entropy_range
from .float_bins import BINS, bin_edges, count_values, in_order, uncount, with_ends

__all__ = ["DistributionObserver", "EntropyObserver", "LpNormObserver", "MSEObserver", "PercentileObserver"]


class DistributionObserver(UniformQuantizationObserverBase):
    """Count all values in fixed bins. A subclass says which range they deserve.

    Args:
        as in UniformQuantizationObserverBase, by name; integer types and per-tensor schemes only; no is_dynamic.

    State: `counts` (int64, one per bin of `float_bins`), `min_val` and `max_val` (exact, float32).
    """

    schemes = PER_TENSOR
    facts: ClassVar[tuple[str, ...]] = ("counts", "min_val", "max_val")

    counts: Tensor
    min_val: Tensor
    max_val: Tensor

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        if integer_range(self.dtype) is None or self.is_dynamic:
            raise SpecError(
                f"{type(self).__name__} needs an integer dtype and is_dynamic=False, got dtype={self.dtype}, "
                f"is_dynamic={self.is_dynamic}; use PlaceholderObserver for a dynamic tensor"
            )
        buffers = self._factory(arguments.get("factory_kwargs"))
        self.register_buffer("counts", torch.zeros(BINS, dtype=torch.int64, device=buffers.get("device")))
        self.register_buffer("min_val", torch.tensor(math.inf, **buffers))
        self.register_buffer("max_val", torch.tensor(-math.inf, **buffers))

    @abstractmethod
    def choose_range(self, counts: Tensor, search: Search) -> tuple[float, float]:
        """The ends to quantize, inside [search.low, search.high], for `counts` in the bins of `bin_edges`."""

    def forward(self, x: Tensor) -> Tensor:
        """Count the values of x."""
        if x.numel() and not x.is_meta and (seen := self._usable(x)) is not None:
            values, lowest, highest = seen
            remember(self, "min_val", "max_val")
            take_back(partial(uncount, self.counts, count_values(values.to(torch.float32), self.counts)))
            if lowest < self.min_val.item():
                self.min_val.fill_(lowest)
            if highest > self.max_val.item():
                self.max_val.fill_(highest)
        return x

    @property
    def has_data(self) -> bool:
        return not is_unset(self.min_val, self.max_val)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """(scale, zero_point), one element each."""
        low, high = self.min_val, self.max_val
        if self.has_data and low < high:
            middle = self._symmetric_zero_point() if is_symmetric(self.qscheme) else None
            bounds = (self.quant_min, self.quant_max)
            search = Search(low.item(), high.item(), *bounds, float(self.eps), middle)
            ends = self.choose_range(in_order(self.counts.cpu()), search)
            low, high = (torch.tensor(end, dtype=torch.float32, device=low.device) for end in ends)
        return self._calculate_qparams(low, high)

    def counted(self) -> tuple[Tensor, Tensor] | None:
        """As ObserverBase.counted; a bin of `float_bins` is at most 1/64 of its value wide."""
        if not self.has_data:
            return None
        counts, edges = in_order(self.counts.cpu()), bin_edges()
        filled = counts.nonzero().flatten()
        values = (edges[filled] + edges[filled + 1]) / 2
        return with_ends(values, self.min_val.item(), self.max_val.item()), counts[filled]

    def reset_min_max_vals(self) -> None:
        self.counts.zero_()
        self.min_val.fill_(math.inf)
        self.max_val.fill_(-math.inf)

    def extra_repr(self) -> str:
        return f"min_val={self.min_val}, max_val={self.max_val}"

    def _merge(self, other: Any) -> None:
        self.counts += other.counts.to(self.counts.device)
        widen(self.min_val, self.max_val, other.min_val, other.max_val)


class LpNormObserver(DistributionObserver):
    """Quantize the range with the smallest sum of |x - quantized x|^p.

    Args:
        p: exponent, >= 1. 2 is the squared error; a larger one spares outliers, a smaller one sacrifices them.
        others: as in DistributionObserver.
    """

    @checked(SpecError)
    def __init__(self, p: float = 2.4, **arguments: Any) -> None:
        super().__init__(**arguments)
        if not 1.0 <= p < math.inf:
            raise SpecError(f"p is the exponent of the error, finite and at least 1, got {p}")
        self.p = p

    def choose_range(self, counts: Tensor, search: Search) -> tuple[float, float]:
        return lp_range(counts, bin_edges(), search, self.p)


class MSEObserver(LpNormObserver):
    """Quantize the range with the smallest squared error. Arguments as in DistributionObserver."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(2.0, **arguments)


class PercentileObserver(DistributionObserver):
    """Quantize the range that holds `percentile` percent of all values, zeros included.

    Args:
        percentile: in (0, 100]. In an affine scheme half of the rest is left out at either end, in a symmetric one the
            rest has the largest magnitudes. 100 is the whole range.
        others: as in DistributionObserver.
    """

    @checked(SpecError)
    def __init__(self, percentile: float = 99.99, **arguments: Any) -> None:
        super().__init__(**arguments)
        if not 0.0 < percentile <= 100.0:
            raise SpecError(f"percentile is the share of values to keep, in (0, 100], got {percentile}")
        self.percentile = percentile

    def choose_range(self, counts: Tensor, search: Search) -> tuple[float, float]:
        edges, total = bin_edges(), int(self.counts.sum())
        counts = counts.clone()
        counts[counts.numel() // 2] = total - int(counts.sum())  # zeros, which `in_order` left out
        rest = (1.0 - self.percentile / 100.0) * total
        if is_symmetric(self.qscheme):
            half = counts.numel() // 2
            bound = _quantile(counts[half:] + counts[:half].flip(0), edges[half:], total - rest)
            bound = min(bound, max(-search.low, search.high))
            return -bound, bound
        low, high = (_quantile(counts, edges, kept) for kept in (rest / 2, total - rest / 2))
        return min(max(low, search.low), search.high), max(min(high, search.high), search.low)


def _quantile(counts: Tensor, edges: Tensor, rank: float) -> float:
    """The value below which `rank` of the counted values lie, spread evenly over their bins."""
    below = torch.cumsum(counts, 0)
    bin_ = int(torch.searchsorted(below, math.ceil(rank)).clamp(max=counts.numel() - 1))
    inside = int(counts[bin_])
    share = (rank - (int(below[bin_]) - inside)) / inside if inside else 0.0
    left, right = edges[bin_].item(), edges[bin_ + 1].item()
    return left + min(max(share, 0.0), 1.0) * (right - left)


class EntropyObserver(DistributionObserver):
    """Quantize the range whose quantized distribution diverges least from the true one (Kullback-Leibler).

    Arguments as in DistributionObserver. Migacz, "8-bit inference with TensorRT" (2017), with ends of their own in
    affine schemes. Meant for 8 bits and less; with more than 4096 levels, where nothing diverges, it keeps the whole
    range.
    """

    def choose_range(self, counts: Tensor, search: Search) -> tuple[float, float]:
        return entropy_range(counts, bin_edges(), search)
