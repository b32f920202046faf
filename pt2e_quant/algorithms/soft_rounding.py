"""SoftRounding: the integers of a weight on its grid as something that gradients can move, up or down by one half each.

q = clamp(floor(w / s) + h(v) + z), h(v) = clamp(1.2 sigmoid(v) - 0.1, 0, 1), and in the end h is 0 or 1: equations 21
to 24 of Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization, ICML 2020, arXiv:2004.10568.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..pt2e.observed import QParams
from .rounding import along

__all__ = ["SoftRounding", "clipped"]

_LOW, _HIGH = -0.1, 1.1
_FACTORS = tuple(1 - step / 40 for step in range(20))


class SoftRounding(nn.Module):
    """A weight between the two integers next to each of its values.

    Args:
        weight: in float.
        qparams: its grid, with static scales.
    """

    def __init__(self, weight: Tensor, qparams: QParams) -> None:
        super().__init__()
        self._dtype, self._bounds = weight.dtype, (qparams.quant_min, qparams.quant_max)
        self._scale, self._zero_point = along(weight, qparams)
        steps = weight.detach().float() / self._scale
        self._floor = steps.floor()
        part = (steps - self._floor - _LOW) / (_HIGH - _LOW)
        self.v = nn.Parameter(torch.logit(part))

    def upward(self) -> Tensor:
        """h(v): the part of a step that each value lies above the integer below it."""
        return (torch.sigmoid(self.v) * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def forward(self) -> Tensor:
        """The weight in between."""
        return self._valued(self.upward())

    def decided(self) -> Tensor:
        """The weight with each value on the nearer of its two integers."""
        return self._valued((self.upward() >= 0.5).float()).detach()

    def undecided(self, beta: float) -> Tensor:
        """Mean over values of 1 - |2 h - 1|^beta, which is 0 when all lie on integers."""
        return 1 - (2 * self.upward() - 1).abs().pow(beta).mean()

    def _valued(self, upward: Tensor) -> Tensor:
        codes = (self._floor + upward + self._zero_point).clamp(*self._bounds)
        return ((codes - self._zero_point) * self._scale).to(self._dtype)


Spread = Callable[[Tensor, "int | None"], Tensor]
"""From errors of a weight and the size of groups to what each of its values counts."""


def _squares(errors: Tensor, group_size: int | None) -> Tensor:
    return errors.square()


def clipped(weight: Tensor, qparams: QParams, spread: Spread = _squares) -> QParams:
    """The grid with steps as small as is best for each channel or group: the sum of what errors count is least.

    Scales shrink to half of theirs at most. A grid whose zero point is not constant stays as it is.
    """
    if (
        qparams.scale is None
        or qparams.zero_point is None
        or bool((qparams.zero_point != qparams.zero_point.flatten()[0]).any())
    ):
        return qparams
    found = [replace(qparams, scale=qparams.scale * factor) for factor in _FACTORS]
    errors = torch.stack([_errors(weight, one, spread) for one in found])
    best = errors.argmin(0).reshape(qparams.scale.shape)
    factors = torch.tensor(_FACTORS, device=qparams.scale.device)[best]
    return replace(qparams, scale=_stored_alike(qparams.scale * factors, qparams.scale))


def _stored_alike(scale: Tensor, old: Tensor) -> Tensor:
    """In bfloat16 where the old one was: a backend that stores it so computes with what the converted graph has."""
    held = torch.equal(old.to(torch.bfloat16).to(old.dtype), old)
    return scale.to(torch.bfloat16 if held else old.dtype).to(old.dtype)


def _errors(weight: Tensor, qparams: QParams, spread: Spread) -> Tensor:
    """What the errors of all values that share a scale count."""
    scale, zero_point = along(weight, qparams)
    codes = (weight.detach().float() / scale + zero_point).round().clamp(qparams.quant_min, qparams.quant_max)
    errors = spread((codes - zero_point) * scale - weight.detach().float(), qparams.group_size)
    if qparams.group_size is not None:
        return errors.unflatten(-1, (-1, qparams.group_size)).sum(-1)  # type: ignore[no-any-return]
    if qparams.axis is not None:
        return errors.movedim(qparams.axis, 0).flatten(1).sum(1)
    return errors.sum()
