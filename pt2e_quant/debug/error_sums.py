"""ErrorSums: what there is to know of the error of one tensor, added up over batches without keeping any of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import QuantizationError
from ..sqnr import decibels

__all__ = ["ErrorSums"]


class ErrorSums:
    """Sums over all values of one tensor, in all batches.

    Sums within a batch are taken in float32 (relative error about 1e-6, or 1e-5 dB), over batches in float64.
    """

    def __init__(self) -> None:
        self.count = 0
        self.largest = self.own_largest = 0.0
        self._signal = self._other = self._product = 0.0
        self._noise = self._own = self._inherited = 0.0
        self._knows_own = False

    def add(self, exact: Tensor, found: Tensor, own: Tensor | None = None) -> None:
        """Take in one batch.

        Args:
            exact, found: the value in the float model and in the other one, of one shape.
            own: what the other model computes from exact inputs; None where that is not known.

        Raises:
            QuantizationError: the shapes differ.
        """
        if exact.shape != found.shape:
            raise QuantizationError(f"shapes {tuple(exact.shape)} and {tuple(found.shape)} cannot be compared")
        of_exact, of_found = exact.detach().flatten().float(), found.detach().flatten().float()
        self.count += of_exact.numel()
        self._signal += _dot(of_exact, of_exact)
        self._other += _dot(of_found, of_found)
        self._product += _dot(of_exact, of_found)
        noise, largest = _size(of_found - of_exact)
        self._noise += noise
        self.largest = _larger(self.largest, largest)
        if own is not None:
            self._add_own(exact, found, own, noise)

    def _add_own(self, exact: Tensor, found: Tensor, own: Tensor, noise: float) -> None:
        self._knows_own = True
        if own is exact:
            self._inherited += noise
            return
        of_own = own.detach().flatten().float()
        power, largest = _size(of_own - exact.detach().flatten())
        self._own += power
        self.own_largest = _larger(self.own_largest, largest)
        self._inherited += 0.0 if own is found else _size(of_own - found.detach().flatten())[0]

    @property
    def sqnr(self) -> float:
        """Of the whole error, in dB."""
        return decibels(self._signal, self._noise)

    @property
    def own(self) -> float:
        """SQNR of what exact inputs give, in dB; NaN where that is not known."""
        return decibels(self._signal, self._own) if self._knows_own else math.nan

    @property
    def inherited(self) -> float:
        """SQNR of what the errors of the inputs change, in dB; NaN where that is not known."""
        return decibels(self._signal, self._inherited) if self._knows_own else math.nan

    @property
    def cosine(self) -> float:
        """Cosine of the angle between both, 1 for two tensors of zeros, 0 where one of them is."""
        if not self._signal or not self._other:
            return 1.0 if self._signal == self._other else 0.0
        return self._product / math.sqrt(self._signal) / math.sqrt(self._other)


def _dot(one: Tensor, other: Tensor) -> float:
    return float(torch.dot(one, other)) if one.numel() else 0.0


def _size(difference: Tensor) -> tuple[float, float]:
    """(sum of squares, largest magnitude)"""
    if not difference.numel():
        return 0.0, 0.0
    low, high = torch.aminmax(difference)
    return _dot(difference, difference), max(abs(float(low)), abs(float(high)))


def _larger(one: float, other: float) -> float:
    """The larger one; NaN when either is."""
    return one if one > other or math.isnan(one) else other
