"""Whether the state of an observer can come from data: what a file says is not believed without looking.

Names of buffers mean the same in all observers, those of other packages included: `min_val` and `max_val`, `counts`,
`histogram`, `scale` and `zero_point`, `*_enabled`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..observer.float_bins import BINS, count_values, in_order

__all__ = ["implausible", "misshapen", "show"]

_MOST = 2**53  # values that can be counted: at a billion a second, it takes a hundred days


def misshapen(
    observer: nn.Module, own: Mapping[str, Tensor], state: Mapping[str, Tensor], example: Tensor | None
) -> str:
    """Why a state does not fit into an observer, '' where it does.

    Args:
        own: the state that the observer has.
        example: a tensor like those that it watches, which tells how many channels or blocks there are.
    """
    for key, value in state.items():
        if value.dtype is not own[key].dtype:
            return f"{key} is {value.dtype}, not {own[key].dtype}"
    unlike = [key for key, value in state.items() if value.shape != own[key].shape and not _unset_channels(key, value)]
    pupil = copy.deepcopy(observer) if unlike else observer
    if not unlike or not show(pupil, example):
        return ""  # where the sizes of inputs are free, so may be those of blocks
    taught = pupil.state_dict()
    for key in unlike:
        if key not in taught or state[key].shape != taught[key].shape:
            wanted = tuple(taught.get(key, own[key]).shape)
            return f"{key} has shape {tuple(state[key].shape)}, not {wanted}"
    return ""


def show(observer: nn.Module, example: Tensor | None) -> bool:
    """Let an observer see one tensor, of zeros, to learn what follows from its shape; False where that is not known."""
    if example is None or not all(isinstance(size, int) for size in example.shape):
        return False
    with torch.no_grad():
        observer(torch.zeros((), dtype=example.dtype).expand(example.shape))
    return True


def implausible(state: Mapping[str, Tensor], bounds: tuple[int, int] | None = None) -> str:
    """Why no data can have led to this state, '' where some can.

    Args:
        bounds: of the integers that a zero point is one of.
    """
    for key, value in state.items():
        path, dot, name = key.rpartition(".")
        prefix = path + dot
        for problem in _CHECKS.get(name, _any)(value, {k: state.get(prefix + k) for k in _BESIDE}, bounds):
            return f"{key} {problem}"
        if name.endswith("_enabled") and bool((value > 1).any()):
            return f"{key} is neither on nor off"
    return ""


_BESIDE = ("min_val", "max_val")
_Beside = Mapping[str, Tensor | None]
_Bounds = tuple[int, int] | None


def _any(value: Tensor, beside: _Beside, bounds: _Bounds) -> Iterator[str]:
    if bool(value.isnan().any()):
        yield "holds NaN"


def _range(low: Tensor, beside: _Beside, bounds: _Bounds) -> Iterator[str]:
    """Of the lower end, which speaks for both."""
    high = beside["max_val"]
    if high is None or high.shape != low.shape:
        yield "has no max_val of its shape beside it"
    elif not _has_range(beside):
        if not (bool((low == math.inf).all()) and bool((high == -math.inf).all())):
            yield "lies above max_val"
    elif not bool((low.isfinite() & high.isfinite()).all()):
        yield "or max_val is not finite"
    elif bool((low > high).any()):
        yield "lies above max_val"


def _counts(counts: Tensor, beside: _Beside, bounds: _Bounds) -> Iterator[str]:
    total = float(counts.double().sum())
    ordered = in_order(counts) if counts.numel() == BINS else None
    if bool((counts < 0).any()) or total > _MOST:
        yield f"has negative counts, or more than {_MOST}"
    elif (total > 0) != _has_range(beside):
        yield f"has {total:g} values, and min_val and max_val say otherwise"
    elif total > 0 and ordered is not None:
        yield from _ends_of_counts(counts, ordered, beside)


def _ends_of_counts(counts: Tensor, ordered: Tensor, beside: _Beside) -> Iterator[str]:
    """The smallest value lies in the first bin with values, the largest in the last."""
    zeros = int(counts[0] + counts[BINS // 2])
    if int(ordered.sum()) + zeros != int(counts.sum()):
        yield "has values that are infinite or NaN"
        return
    filled = ordered.nonzero().flatten().tolist()
    middle = len(ordered) / 2 - 0.5  # between the two bins next to zero, which zeros are in
    places = [*filled, *([middle] if zeros else [])]
    for name, place in (("min_val", min(places)), ("max_val", max(places))):
        end = beside[name]
        if end is None or end.numel() != 1 or _bin(end, middle) != place:
            yield f"does not end where {name} lies"


def _bin(value: Tensor, zero: float) -> float:
    """Where in the order of all bins a value is counted."""
    counts = torch.zeros(BINS, dtype=torch.int64)
    count_values(value.detach().cpu().float().reshape(1), counts)
    filled = in_order(counts).nonzero()
    return int(filled[0]) if filled.numel() else zero


def _histogram(histogram: Tensor, beside: _Beside, bounds: _Bounds) -> Iterator[str]:
    if not bool((histogram.isfinite() & (histogram >= 0)).all()):
        yield "is negative somewhere, or not finite"
    elif (float(histogram.double().sum()) > 0) != _has_range(beside):
        yield "is not that of min_val and max_val"


def _scale(scale: Tensor, beside: _Beside, bounds: _Bounds) -> Iterator[str]:
    if not bool((scale.isfinite() & (scale > 0)).all()):
        yield "is not positive and finite"


def _zero_point(zero_point: Tensor, beside: _Beside, bounds: _Bounds) -> Iterator[str]:
    if not bool(zero_point.isfinite().all()):
        yield "is not finite"
    elif bounds is None or zero_point.is_floating_point():
        return  # one that is learned is rounded and clamped later
    elif bool(((zero_point < bounds[0]) | (zero_point > bounds[1])).any()):
        yield f"lies outside of {bounds}"


_CHECKS: dict[str, Callable[[Tensor, _Beside, _Bounds], Iterator[str]]] = {
    "counts": _counts,
    "histogram": _histogram,
    "max_val": lambda value, beside, bounds: iter(()),  # judged with min_val
    "min_val": _range,
    "scale": _scale,
    "zero_point": _zero_point,
}


def _has_range(beside: _Beside) -> bool:
    low, high = beside["min_val"], beside["max_val"]
    if low is None or high is None or low.shape != high.shape:
        return False
    return low.numel() > 0 and not bool((low > high).all())


def _unset_channels(key: str, value: Tensor) -> bool:
    """True for a range that waits for the first batch to say how many channels there are."""
    return key.rpartition(".")[2] in _BESIDE and value.shape == (0,)
