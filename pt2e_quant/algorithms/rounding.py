"""Rounding: what convert will make of an observer, as a function of values through which gradients pass straight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..fake_quantize.rounding import on_grid
from ..pt2e.observed import QParams
from ..qparams import fake_quantize

__all__ = ["along", "rounded"]

_OPS = torch.ops.quantized_decomposed


def rounded(x: Tensor, qparams: QParams) -> Tensor:
    """x as the q/dq pair written from `qparams` gives it back; the gradient is 1 inside of the range.

    Args:
        x: a floating-point tensor.
        qparams: a cast, a static grid, or run-time qparams.
    """
    if qparams.is_cast:
        return _straight(x, x.to(qparams.dtype).to(x.dtype))
    bounds = (qparams.quant_min, qparams.quant_max)
    if qparams.scale is None or qparams.zero_point is None:
        return _straight(x, _at_run_time(x.detach(), qparams))
    if qparams.group_size is not None:
        group = {"group_size": qparams.group_size}
        return _straight(x, fake_quantize(x.detach(), qparams.scale, qparams.zero_point, *bounds, **group))
    scale, zero_point = qparams.scale.flatten().to(torch.float32), qparams.zero_point.flatten()
    zero_point = zero_point if zero_point.is_floating_point() else zero_point.to(torch.int32)
    return on_grid(x, scale.to(x.device), zero_point.to(x.device), *bounds, qparams.axis)


def _straight(x: Tensor, value: Tensor) -> Tensor:
    return x + (value - x).detach() if x.requires_grad else value


def _at_run_time(x: Tensor, qparams: QParams) -> Tensor:
    limits: tuple[Any, ...] = (qparams.quant_min, qparams.quant_max, qparams.dtype)
    if qparams.per_token:
        scale, zero_point = _OPS.choose_qparams_per_token_asymmetric(x, qparams.dtype)
        codes = _OPS.quantize_per_token(x, scale, zero_point, *limits)
        value: Tensor = _OPS.dequantize_per_token(codes, scale, zero_point, *limits, x.dtype)
        return value
    choose = _OPS.choose_qparams_symmetric.tensor if qparams.symmetric else _OPS.choose_qparams.tensor
    scale, zero_point = choose(x, *limits[:2], qparams.eps, qparams.dtype)
    codes = _OPS.quantize_per_tensor.tensor(x, scale, zero_point, *limits)
    return _OPS.dequantize_per_tensor.tensor(codes, scale, zero_point, *limits).to(x.dtype)  # type: ignore[no-any-return]


def along(weight: Tensor, qparams: QParams) -> tuple[Tensor, Tensor]:
    """Scale and zero point in shapes that broadcast over the weight, in float32."""
    both: list[Tensor] = []
    for one in (qparams.scale, qparams.zero_point):
        values: Tensor = one.to(weight.device, torch.float32)  # type: ignore[union-attr]  # static grids have both
        if qparams.group_size is not None:
            both.append(values.repeat_interleave(qparams.group_size, -1))
        elif qparams.axis is not None:
            both.append(
                values.reshape([-1 if dim == qparams.axis % weight.dim() else 1 for dim in range(weight.dim())])
            )
        else:
            both.append(values.reshape(()))
    return both[0], both[1]
