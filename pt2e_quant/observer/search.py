"""Which part of a histogram to keep: the greedy search of the reference, with the same result and without its loop.

The search narrows [first bin, last bin] from both ends, a quantile step of 1e-5 at a time, and stops at the first move
that raises the squared error of quantizing. Two facts make it fast:
- the moves do not depend on the errors, which only decide where to stop: so moves are listed first, by looking bins up
  in the cumulated histogram instead of walking, and steps that change nothing are leapt over;
- errors are then computed for many moves at once.
Every float32 rounding of the reference is kept, so the same bins come out, bit for bit.

Its known weakness is kept with it (the first move is taken whatever it costs): this is the compatible search.

Before this: `histogram` counts. After it: the range goes to `qparams`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from ctypes import c_float
from functools import cache
from itertools import accumulate, chain, islice, repeat

import torch
from torch import Tensor

__all__ = ["greedy_range"]

_STEP = 1e-5


def greedy_range(histogram: Tensor, low: float, high: float, levels: int) -> tuple[int, int]:
    """First and last bin to keep.

    Args:
        histogram: counts, one dimension, float32, on the CPU.
        low, high: real values of the outer edges of the histogram, low < high.
        levels: number of integers that the kept range will be divided into.
    """
    kept, smallest = (0, histogram.numel() - 1), float("inf")
    moves = _moves(histogram)
    for size in chain((8, 24), repeat(64)):  # most searches end within the first few moves
        batch = list(islice(moves, size))
        if not batch:
            break
        for move, error in zip(batch, _errors(histogram, low, high, levels, batch), strict=True):
            if error > smallest:
                return kept
            kept, smallest = move, error
    return kept


def _moves(histogram: Tensor) -> Iterator[tuple[int, int]]:
    """(first, last) bin after each move of the greedy search, as if no move were ever refused."""
    cumulated: list[float] = torch.cumsum(histogram, 0).tolist()
    total = torch.sum(histogram).item()
    upper = _upper_quantiles()
    alpha, step, first, last = 0.0, 0, 0, len(cumulated) - 1
    while alpha < upper[step] and first < last and total > 0.0:
        left = bisect_left(cumulated, _float32((alpha + _STEP) * total))
        right = bisect_right(cumulated, _float32(upper[step + 1] * total)) - 1
        left, right = max(first, min(left, last)), min(last, max(right, first))
        if left - first > last - right:
            first, alpha = left, alpha + _STEP
        elif right < last:
            last, step = right, step + 1
        else:
            step = _leap(cumulated[last], total, step)
            continue
        yield first, last


def _leap(count: float, total: float, step: int) -> int:
    """The last step before the upper quantile falls below `count`; until then no end of the range can move."""
    upper = _upper_quantiles()
    # Rounding moves a threshold by less than one step, so counting up from two steps before finds the first one.
    below = max(step + 2, int((1.0 - count / total) / _STEP) - 2)
    while below < len(upper) - 1 and _float32(upper[below] * total) >= count:
        below += 1
    return below - 1


@cache
def _upper_quantiles() -> list[float]:
    """1, 1 - step, (1 - step) - step, ... to below zero, with the rounding of repeated subtraction."""
    return list(accumulate(repeat(-_STEP, round(1.0 / _STEP) + 8), initial=1.0))


def _float32(value: float) -> float:
    return c_float(value).value


def _errors(histogram: Tensor, low: float, high: float, levels: int, moves: list[tuple[int, int]]) -> list[float]:
    """Squared error of quantizing to `levels` equal steps over each kept range; one row per move.

    The values of a bin count as spread evenly over it. The integral of (x - center)^2 over the bin is then the part up
    to the end of the step where it begins, plus the whole steps between, plus the part of the step where it ends.
    """
    bins = histogram.numel()
    bin_width = (high - low) / bins
    begins = torch.tensor([float(first) for first, _ in moves]).unsqueeze(1)
    step = torch.tensor(
        [bin_width * (last - first + 1) / levels for first, last in moves], dtype=torch.float64
    ).unsqueeze(1)
    half, step32 = (step / 2).float(), step.float()
    cube = half * half * half

    start = torch.arange(bins, dtype=torch.float32).sub(begins).mul_(bin_width)
    end = start + bin_width
    start_step, end_step = _whole_steps(start, step32, levels), _whole_steps(end, step32, levels)
    density = histogram / bin_width

    head = start.sub_((start_step + 0.5).mul_(step32))
    tail = end.sub_((end_step * step32).add_(half))
    error = (cube - head * head * head).div_(3).mul_(density)
    error += end_step.sub_(start_step).sub_(1).mul_(density * ((cube + cube) / 3))
    error += (tail * tail * tail).add_(cube).div_(3).mul_(density)
    return error.sum(dim=1).tolist()


def _whole_steps(x: Tensor, step: Tensor, levels: int) -> Tensor:
    """floor(x / step), exactly: a quotient of two float32 that is not an integer is not one in float64 either.

    The same as torch.div(rounding_mode="floor"), which takes five times as long because it goes through fmod.
    """
    return (x.double() / step.double()).floor_().clamp_(0, levels - 1).float()
