"""Max pools of codes. Before this: the handlers of `operators`, which know grids."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

__all__ = ["max_pool"]

_POOL: Any = getattr(
    getattr(torch.ops.quantized, "max_pool2d", None), "default", None
)  # on plain uint8: Inductor's x86 path depends on it


def max_pool(func: OpOverload, codes: Tensor, window: tuple[Any, ...], ceil: bool, lowest: int) -> Tensor:
    """The largest code of each window.

    torch's operator for integers refuses what has more places than its type of codes can count, and is 10 times slower
    than one dimension after the other.

    Args:
        func: torch's operator, which says the shape of the result.
        codes: (batch, channels, ...) or without the batch.
        window: kernel, stride (kernel where it is empty), padding and dilation, as the operator takes them.
        ceil: whether windows that begin inside and end outside count.
        lowest: the smallest code, which pads.
    """
    kernel, stride, *rest = window
    dims = len(kernel)
    sizes = [_per_dimension(given, dims) for given in (kernel, stride or kernel, *rest)]
    if _has_pool(codes, dims):
        return _POOL(codes, *sizes, ceil)  # type: ignore[no-any-return]
    shape = func(torch.empty(codes.shape, device="meta"), *sizes, ceil)[0].shape
    for dim, along in enumerate(zip(*sizes, strict=True), codes.dim() - dims):
        codes = _largest(codes, dim, int(shape[dim]), along, lowest)
    return codes


def _per_dimension(given: int | list[int], dims: int) -> list[int]:
    numbers = [given] if isinstance(given, int) else list(given)
    return numbers * dims if len(numbers) == 1 else numbers


def _has_pool(codes: Tensor, dims: int) -> bool:
    """Whether torch's kernel for channels last computes this max pool: 4 times faster than one dimension at a time."""
    plain = codes.dtype is torch.uint8 and codes.device.type == "cpu" and dims == 2 and codes.dim() == 4
    fits = plain and codes.is_contiguous(memory_format=torch.channels_last) and codes.numel() > 0
    return fits and _POOL is not None


def _largest(codes: Tensor, dim: int, count: int, window: tuple[int, int, int, int], lowest: int) -> Tensor:
    """The largest of each window along one dimension."""
    size, step, pad, apart = window
    reach = (count - 1) * step + (size - 1) * apart + 1
    after = max(0, reach - codes.shape[dim] - pad)
    if pad or after:
        amounts = [0, 0] * (codes.dim() - 1 - dim) + [pad, after]
        codes = torch.nn.functional.pad(codes, amounts, value=lowest)
    ends = (count - 1) * step + 1
    before = (slice(None),) * dim
    places = [(*before, slice(start, start + ends, step)) for start in range(0, size * apart, apart)]
    return functools.reduce(torch.maximum, (codes[place] for place in places))
