"""One scale for each group of neighbours in a row: for weights of few bits.

Before this: `base`. After it: the engine reads `granularity` beside the qparams and emits q/dq per channel group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import checked
from ..errors import SpecError
from ..specs import PER_CHANNEL
from .granularity import PerGroup
from .min_max import PerChannelMinMaxObserver

__all__ = ["PerGroupMSEObserver", "PerGroupMinMaxObserver"]

_PARTS = tuple(1 - step / 32 for step in range(13))
"""Parts of a range that the search tries. Below five eighths, nothing is gained for 4 bits and bell-shaped values."""


class PerGroupMinMaxObserver(PerChannelMinMaxObserver):
    """Keep the range of each `group_size` neighbours in each row of a matrix.

    Args:
        group_size: values that share a scale; the width of a row must be a multiple of it. A row that is narrower
            than a group is one group.
        scale_dtype: type that the backend stores scales in; scales are rounded to it here, so that the converted
            graph computes with the same ones. They stay float32 tensors.
        ch_axis: 0, since each row has scales of its own; None is the same.
        others: as in PerChannelMinMaxObserver, by name; int8 and symmetric unless told otherwise.

    qparams have one element for each group, in the shape (rows, groups in a row).
    """

    group_size = 32
    schemes = PER_CHANNEL

    @checked(SpecError)
    def __init__(
        self,
        group_size: int = 32,
        scale_dtype: torch.dtype = torch.float32,
        ch_axis: int | None = 0,
        **arguments: Any,
    ) -> None:
        if group_size < 2 or ch_axis not in (0, None):
            raise SpecError(f"groups are 2 values or more of one row (ch_axis=0), got {group_size=}, {ch_axis=}")
        super().__init__(0, **{"dtype": torch.int8, "qscheme": torch.per_channel_symmetric, **arguments})
        self.group_size = group_size
        self.granularity = PerGroup(group_size)
        self.block_size: tuple[int, int] | None = None
        self.scale_dtype = scale_dtype

    def _calculate_qparams(self, min_val: Tensor, max_val: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero_point = super()._calculate_qparams(min_val, max_val)
        return scale.to(self.scale_dtype).to(scale.dtype), zero_point

    def _channel_ranges(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        size = min(self.group_size, x.shape[-1])
        if x.dim() != 2 or x.shape[-1] % size:
            raise SpecError(
                f"{self._where}: a tensor of shape {tuple(x.shape)} is not a matrix whose rows split into groups of "
                f"{self.group_size}; choose a divisor of the width, or one scale for each row"
            )
        self.block_size = (1, size)
        ranges = super()._channel_ranges(x.reshape(-1, size))
        return None if ranges is None else (ranges[0].reshape(len(x), -1), ranges[1].reshape(len(x), -1))


class PerGroupMSEObserver(PerGroupMinMaxObserver):
    """Keep, of each group's range, the part that makes the squared error of rounding smallest. For weights.

    With 4 bits it takes an eighth of the error's power, and half of what a small language model loses by it. The
    arguments are those of PerGroupMinMaxObserver.
    """

    def _channel_ranges(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        ranges = super()._channel_ranges(x)
        if ranges is None:
            return None
        low, high = ranges
        groups = x.detach().to(low.device, torch.float32).reshape(*low.shape, -1)
        best, smallest = torch.ones_like(low), torch.full_like(low, torch.inf)
        for part in _PARTS:
            scale, zero_point = (one.unsqueeze(-1) for one in self._calculate_qparams(low * part, high * part))
            codes = torch.clamp(torch.round(groups / scale) + zero_point, self.quant_min, self.quant_max)
            error = ((codes - zero_point) * scale - groups).pow_(2).sum(-1)
            best, smallest = best.where(error >= smallest, part), torch.minimum(smallest, error)
        return low * best, high * best
