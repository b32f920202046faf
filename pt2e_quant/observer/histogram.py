"""The observer that keeps a histogram, to leave outliers out of the range.

Counts are kept in equal bins over the range seen so far; a batch that widens the range spreads the old counts over the
new bins. `search` then finds the part of the histogram to keep. The result is that of the reference's
HistogramObserver, at a fraction of the time.

Before this: `base`. After it: `search` picks the bins, `qparams` turns their edges into a scale.
"""

from __future__ import annotations

import math
from ctypes import c_float
from typing import Any

import torch
from torch import Tensor

from ..checks import checked
from ..errors import SpecError
from ..qparams import FLOAT32_EPS, flat
from ..specs import PER_TENSOR, integer_range
from .base import FLOAT32_MAX, UniformQuantizationObserverBase, is_unset, revive_scalar
from .batch import remember
from .search import greedy_range

__all__ = ["HistogramObserver"]

_FEW = 1 << 13  # below this, torch.histc is as fast as the steps that replace it
MOST_BINS = 1 << 24  # 64 MiB of counts; more say no more of float32 values
_CHUNK = 1 << 18  # values that are binned at once: 1 MiB in float32 stays in the cache through the five steps


class HistogramObserver(UniformQuantizationObserverBase):
    """Keep a histogram of every tensor seen, and quantize the part of it that a greedy search keeps.

    The reference's observer, with its results. MSEObserver counts exactly, searches better and costs less.

    Its bins follow the range seen so far, so merged parts of the data have the range of one pass and every count, but
    counts may lie in neighbouring bins.

    Args:
        bins: number of bins.
        others: as in UniformQuantizationObserverBase, integer types and per-tensor schemes only; is_dynamic is refused.
    """

    schemes = PER_TENSOR

    histogram: Tensor
    min_val: Tensor
    max_val: Tensor

    @checked(SpecError)
    def __init__(
        self,
        bins: int = 2048,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme | None = torch.per_tensor_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: dict[str, Any] | None = None,
        eps: float = FLOAT32_EPS,
        is_dynamic: bool = False,
    ) -> None:
        super().__init__(dtype, qscheme, reduce_range, quant_min, quant_max, factory_kwargs, eps, is_dynamic)
        whole = integer_range(dtype)
        if whole is None or not 1 <= bins <= MOST_BINS or is_dynamic:
            raise SpecError(
                f"a histogram needs an integer dtype, 1 to {MOST_BINS} bins and is_dynamic=False, got dtype={dtype}, "
                f"bins={bins}, is_dynamic={is_dynamic}; use PlaceholderObserver for a dynamic tensor"
            )
        buffers = self._factory(factory_kwargs)
        self.bins = bins
        self.dst_nbins = whole[1] - whole[0] + 1
        self.upsample_rate = 16
        self.register_buffer("histogram", torch.zeros(bins, **buffers))
        self.register_buffer("min_val", torch.tensor(math.inf, **buffers))
        self.register_buffer("max_val", torch.tensor(-math.inf, **buffers))

    def forward(self, x: Tensor) -> Tensor:
        """Add the values of x to the histogram."""
        if x.numel() and not x.is_meta and (found := self._usable(x)) is not None:
            values, lowest, highest = found
            remember(self, "histogram", "min_val", "max_val")
            low, high = min(self.min_val.item(), lowest), max(self.max_val.item(), highest)
            self._add(low, high, _counts(values.to(torch.float32), self.bins, low, high))
        return x

    def _add(self, new_low: float, new_high: float, counts: Tensor) -> None:
        """Add counts in bins over [new_low, new_high], which holds the range so far."""
        low, high = self.min_val.item(), self.max_val.item()
        if low == new_low and high == new_high:
            self.histogram += counts.to(self.histogram.device)
            return
        if low <= high:
            counts += self._spread(low, high, new_low, new_high)
        self.histogram.copy_(counts)
        self.min_val.fill_(new_low)
        self.max_val.fill_(new_high)

    def _merge(self, other: Any) -> None:
        if not other.has_data:
            return
        theirs = other.min_val.item(), other.max_val.item()
        low, high = min(self.min_val.item(), theirs[0]), max(self.max_val.item(), theirs[1])
        same = theirs == (low, high)
        self._add(low, high, other.histogram.cpu().clone() if same else other._spread(*theirs, low, high))

    @property
    def has_data(self) -> bool:
        return not is_unset(self.min_val, self.max_val)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """(scale, zero_point), one element each."""
        return self._calculate_qparams(*(self._search() if self.has_data else (self.min_val, self.max_val)))

    def counted(self) -> tuple[Tensor, Tensor] | None:
        """As ObserverBase.counted, a value for each bin."""
        if not self.has_data:
            return None
        low, high = self.min_val.item(), self.max_val.item()
        return torch.linspace(low, high, self.bins, dtype=torch.float64), self.histogram.cpu()

    def reset_min_max_vals(self) -> None:
        self.histogram.zero_()
        self.min_val.fill_(math.inf)
        self.max_val.fill_(-math.inf)

    def extra_repr(self) -> str:
        return f"min_val={self.min_val}, max_val={self.max_val}"

    def _search(self) -> tuple[Tensor, Tensor]:
        """Ends of the part of the histogram that is worth keeping."""
        low, high = self.min_val.cpu(), self.max_val.cpu()
        if low == high:
            return self.min_val, self.max_val
        type_ = _arithmetic(low.item(), high.item(), self.bins)
        ends = (low.item(), high.item()) if type_ is torch.float32 else (0.0, float(self.bins))  # only ratios matter
        first, last = greedy_range(self.histogram.cpu(), *ends, self.dst_nbins)
        low, width = low.to(type_), (high.to(type_) - low.to(type_)) / self.bins
        return low + width * first, low + width * (last + 1)

    def _spread(self, low: float, high: float, new_low: float, new_high: float) -> Tensor:
        """The histogram over [low, high] as one over the wider range [new_low, new_high].

        Each bin is cut into `upsample_rate` equal pieces, and a piece goes to the new bin that holds its middle.
        """
        old = self.histogram.cpu()
        if low == high:  # all counts stand for one value
            return _counts(torch.tensor([low]), self.bins, new_low, new_high) * old.sum()
        pieces, type_ = self.bins * self.upsample_rate, _arithmetic(new_low, new_high, self.bins)
        width = (torch.tensor(high, dtype=type_) - torch.tensor(low, dtype=type_)) / pieces
        middles = torch.linspace(low, high, pieces + 1, dtype=type_)[:-1] + 0.5 * width
        edges = torch.linspace(new_low, new_high, self.bins + 1, dtype=type_)
        # Both are sorted: the pieces of a new bin are neighbours. What rounding pushed out belongs to the outer bins.
        first_piece = _lookup(middles, edges, float(width))
        first_piece[0], first_piece[-1] = 0, pieces
        weights = old.repeat_interleave(self.upsample_rate) / self.upsample_rate
        return torch.segment_reduce(weights, "sum", offsets=first_piece, unsafe=True)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        revive_scalar(state_dict, prefix + "min_val", math.inf)
        revive_scalar(state_dict, prefix + "max_val", -math.inf)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _counts(x: Tensor, bins: int, low: float, high: float) -> Tensor:
    """How many values of x fall into each of `bins` equal bins over [low, high], which holds them all. On the CPU.

    Gives the counts of torch.histc, whose CPU kernel takes three to six times as long for many values.
    """
    if low == high:
        total = torch.zeros(bins)
        total[bins // 2] = x.numel()
        return total
    type_ = _arithmetic(low, high, bins)
    if x.device.type != "cpu" or x.numel() < _FEW:
        return torch.histc(x.to(type_), bins, min=low, max=high).to("cpu", torch.float32)
    span = high - low if type_ is torch.float64 else c_float(high - low).value
    index_type = torch.int16 if bins < torch.iinfo(torch.int16).max else torch.int32
    counts = []
    for chunk in flat(x).split(_CHUNK):
        position = chunk.to(type_).sub(low).mul_(bins).div_(span)
        counts.append(torch.bincount(position.to(index_type), minlength=bins + 1))
    total = sum(counts[1:], counts[0]).to(torch.float32)
    total[bins - 1 : bins] += total[bins:]  # the last bin holds its right edge
    return total[:bins]


def _lookup(middles: Tensor, edges: Tensor, width: float) -> Tensor:
    """torch.searchsorted(middles, edges): for each edge, the first of these (nearly) equidistant values not below it.

    A binary search among 32768 values mispredicts half of its branches. The distance tells where to look; only where
    rounding made that wrong, as in a range of a few float32 steps, is a search needed.
    """
    if width == 0.0:  # denormal, and lost in rounding
        return torch.searchsorted(middles, edges)
    guess = edges.sub(middles[0]).div_(width).ceil_().clamp_(0, middles.numel()).to(torch.int64)
    fenced = torch.nn.functional.pad(middles, (1, 1), value=math.inf)
    fenced[0] = -math.inf
    guess += fenced[guess + 1] < edges
    guess -= (fenced[guess] >= edges).to(torch.int64)
    right = (fenced[guess] < edges) & (fenced[guess + 1] >= edges)
    return guess if bool(right.all()) else torch.searchsorted(middles, edges)


def _arithmetic(low: float, high: float, bins: int) -> torch.dtype:
    """float32, as the reference, unless bins of this range overflow it, or are denormal (the reference goes astray)."""
    return torch.float32 if 1e-30 <= high - low <= FLOAT32_MAX / bins else torch.float64
