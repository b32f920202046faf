"""Weights of few bits, rounded while training with one scale for each group in a row, found anew or learned.

Before this: an observer of groups. After it: `convert` writes q/dq per channel group, on the same grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..errors import SpecError
from ..observer import PerGroupMinMaxObserver
from ..observer.batch import remember
from .affine import FakeQuantize, within_int64
from .base import FakeQuantizeBase
from .learnable import LearnableFakeQuantize
from .rounding import on_grid

__all__ = ["LearnablePerGroupFakeQuantize", "PerGroupFakeQuantize"]


class _InGroups(FakeQuantizeBase):
    """What both have of the observer inside, which looks at the weights of today alone."""

    activation_post_process: PerGroupMinMaxObserver
    group_size = 32

    def _read_groups(self) -> None:
        inner = self.activation_post_process
        if not isinstance(inner, PerGroupMinMaxObserver):
            raise SpecError(
                f"{type(self).__name__} takes the range of each group from a PerGroupMinMaxObserver, got "
                f"{type(inner).__name__}; use FakeQuantize or LearnableFakeQuantize for other observers"
            )
        self.group_size = inner.group_size
        self.granularity = inner.granularity

    def _forget(self) -> None:
        remember(self.activation_post_process, "min_val", "max_val")
        self.activation_post_process.reset_min_max_vals()


class PerGroupFakeQuantize(FakeQuantize, _InGroups):
    """Round a matrix in groups of neighbours, to the grids that its observer finds for the weights of today alone.

    Args:
        observer: PerGroupMinMaxObserver, PerGroupMSEObserver, or a recipe of one.
        arguments: of the observer: group_size, scale_dtype, quant_min, quant_max, eps, ...

    Raises:
        SpecError: another observer, or one that refuses its arguments.
    """

    def __init__(self, observer: Callable[..., Any] = PerGroupMinMaxObserver, **arguments: Any) -> None:
        super().__init__(observer, **arguments)
        self._read_groups()

    def _observe(self, x: Tensor) -> None:
        self._forget()
        super()._observe(x)

    def _round(self, x: Tensor) -> Tensor:
        groups = within_int64(self, x).reshape(len(self.scale.flatten()), -1)
        qparams = (self.scale.flatten(), self.zero_point.flatten())
        bounds = (self.quant_min, self.quant_max)
        return on_grid(groups, *qparams, *bounds, axis=0).reshape(x.shape)


class LearnablePerGroupFakeQuantize(LearnableFakeQuantize, _InGroups):
    """Round a matrix in groups of neighbours, to grids that start where an observer puts them and are then trained.

    Scales are rounded to the `scale_dtype` of the observer in every forward, and their gradients pass straight through.

    Args:
        observer: PerGroupMinMaxObserver, PerGroupMSEObserver, or a recipe of one.
        quant_min, quant_max: bounds of q, both included.
        arguments: of LearnableFakeQuantize and of the observer.

    Raises:
        SpecError: another observer, or one that refuses its arguments.
    """

    def __init__(
        self,
        observer: Callable[..., Any] = PerGroupMinMaxObserver,
        quant_min: int = -8,
        quant_max: int = 7,
        **arguments: Any,
    ) -> None:
        super().__init__(observer, quant_min, quant_max, **arguments)
        self._read_groups()

    def _observe(self, x: Tensor) -> None:
        self._forget()
        super()._observe(x)

    def _grid(self) -> tuple[Tensor, Tensor]:
        scale, zero_point = super()._grid()
        stored = scale.detach().to(self.activation_post_process.scale_dtype).to(scale.dtype)
        return scale + (stored - scale.detach()), zero_point

    def _kernel(self, values: Tensor, scale: Tensor, zero_point: Tensor, factor: float) -> Tensor:
        groups = values.reshape(scale.numel(), -1)
        return super()._kernel(groups, scale.flatten(), zero_point.flatten(), factor).reshape(values.shape)
