"""SQNR, the signal-to-quantization-noise ratio, in dB: one measure for everything that compares numbers of a model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import QuantizationError

__all__ = ["decibels", "differences", "floating", "power", "sqnr"]


def sqnr(exact: Any, other: Any) -> float:
    """How much stronger a signal is than its difference to another version of it, in dB; see `decibels`.

    Args:
        exact: a tensor, or a structure of tensors (the outputs of a model). Integers and booleans do not count.
        other: the same, of equal structure and shapes.

    Raises:
        QuantizationError: they differ in structure or in shapes.
    """
    return decibels(power(floating(exact)), power(differences(exact, other)))


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise): infinite without noise; minus infinite without a signal or with infinite noise.

    Args:
        signal: power of the exact values, as `power` gives it; add up those of batches before.
        noise: power of the differences of the same values. NaN makes the result NaN.
    """
    if noise == 0:
        return math.inf
    return -math.inf if signal == 0 or math.isinf(noise) else 10 * math.log10(signal / noise)


def power(tensors: Iterable[Tensor]) -> float:
    """The sum of the squares of all values, in float64."""
    return sum((float(tensor.double().square().sum()) for tensor in tensors), 0.0)


def differences(exact: Any, other: Any) -> list[Tensor]:
    """exact - other of each floating-point tensor of two structures, in float64.

    Raises:
        QuantizationError: they differ in structure or in shapes.
    """
    ours, theirs = floating(exact), floating(other)
    shapes = [tuple(one.shape) for one in ours], [tuple(one.shape) for one in theirs]
    if shapes[0] != shapes[1]:
        raise QuantizationError(f"floating-point tensors of shapes {shapes[0]} have no differences to {shapes[1]}")
    return [one.double() - two.double() for one, two in zip(ours, theirs, strict=True)]


def floating(values: Any) -> list[Tensor]:
    """The floating-point tensors of a structure, without gradients."""
    return [v.detach() for v in pytree.tree_leaves(values) if isinstance(v, Tensor) and v.is_floating_point()]
