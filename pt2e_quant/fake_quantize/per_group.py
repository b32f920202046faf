"""PerGroupFakeQuantize: weights of few bits, rounded while training with one scale for each group in a row.

Before this: an observer of groups. After it: `convert` writes q/dq per channel group, on the same grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import SpecError
from ..observer import PerGroupMinMaxObserver
from ..observer.batch import remember
from .affine import FakeQuantize, within_int64

__all__ = ["PerGroupFakeQuantize"]


class PerGroupFakeQuantize(FakeQuantize):
    """Round a matrix in groups of neighbours, to the grids that its observer finds for the weights of today alone.

    Args:
        observer: PerGroupMinMaxObserver, PerGroupMSEObserver, or a recipe of one.
        arguments: of the observer: group_size, scale_dtype, quant_min, quant_max, eps, ...

    Raises:
        SpecError: another observer, or one that refuses its arguments.
    """

    group_size = 32

    def __init__(self, observer: Callable[..., Any] = PerGroupMinMaxObserver, **arguments: Any) -> None:
        super().__init__(observer, **arguments)
        inner = self.activation_post_process
        if not isinstance(inner, PerGroupMinMaxObserver):
            raise SpecError(
                f"PerGroupFakeQuantize takes the range of each group from a PerGroupMinMaxObserver, got "
                f"{type(inner).__name__}; use FakeQuantize for other observers"
            )
        self.group_size = inner.group_size
        self.granularity = inner.granularity

    def _observe(self, x: Tensor) -> None:
        remember(self.activation_post_process, "min_val", "max_val")
        self.activation_post_process.reset_min_max_vals()
        super()._observe(x)

    def _round(self, x: Tensor) -> Tensor:
        groups = within_int64(self, x).reshape(len(self.scale.flatten()), -1)
        qparams = (self.scale.flatten(), self.zero_point.flatten())
        bounds = (self.quant_min, self.quant_max)
        return torch.fake_quantize_per_channel_affine(groups, *qparams, 0, *bounds).reshape(x.shape)
