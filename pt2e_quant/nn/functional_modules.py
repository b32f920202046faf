"""Sums, products and concatenations as modules, so that their results can be observed and have a grid of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..errors import QuantizedTensorError
from ..qtensor.tensor import door
from .observed import activation_grid, as_quantized
from .weighted import Quantized

__all__ = ["FXFloatFunctional", "FloatFunctional", "QFunctional"]

_NO_FORWARD = "is no layer: call its methods add, add_relu, add_scalar, cat, matmul, mul or mul_scalar"


class FXFloatFunctional(nn.Module):
    """The operations on float tensors, for models that a symbolic trace observes by itself."""

    def forward(self, x: Tensor) -> Tensor:
        """Refused: there is no one operation."""
        raise QuantizedTensorError(f"{type(self).__name__} {_NO_FORWARD}")

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y."""
        return torch.add(x, y)

    def add_scalar(self, x: Tensor, y: float) -> Tensor:
        """x + y, y a number."""
        return torch.add(x, y)

    def mul(self, x: Tensor, y: Tensor) -> Tensor:
        """x * y."""
        return torch.mul(x, y)

    def mul_scalar(self, x: Tensor, y: float) -> Tensor:
        """x * y, y a number."""
        return torch.mul(x, y)

    def cat(self, x: list[Tensor], dim: int = 0) -> Tensor:
        """One tensor of several."""
        return torch.cat(x, dim=dim)

    def add_relu(self, x: Tensor, y: Tensor) -> Tensor:
        """relu(x + y)."""
        return torch.relu(torch.add(x, y))

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        """x @ y."""
        return torch.matmul(x, y)


class FloatFunctional(FXFloatFunctional):
    """The operations on float tensors, each result shown to `activation_post_process`. `convert` makes a QFunctional.

    Results with a number as operand are not observed: their grid follows from that of the tensor.
    """

    _takes_numbers = False

    def __init__(self) -> None:
        super().__init__()
        self.activation_post_process: nn.Module = nn.Identity()

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return self._seen(super().add(x, y))

    def mul(self, x: Tensor, y: Tensor) -> Tensor:
        return self._seen(super().mul(x, y))

    def cat(self, x: list[Tensor], dim: int = 0) -> Tensor:
        return self._seen(super().cat(x, dim))

    def add_relu(self, x: Tensor, y: Tensor) -> Tensor:
        return self._seen(super().add_relu(x, y))

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        return self._seen(super().matmul(x, y))

    def add_scalar(self, x: Tensor, y: float) -> Tensor:
        self._takes_numbers = True
        return super().add_scalar(x, y)

    def mul_scalar(self, x: Tensor, y: float) -> Tensor:
        self._takes_numbers = True
        return super().mul_scalar(x, y)

    def _seen(self, result: Tensor) -> Tensor:
        return self.activation_post_process(result)  # type: ignore[no-any-return]


class QFunctional(Quantized):
    """The operations on QTensors, with results on the grid (scale, zero_point)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.zero_point = 1.0, 0
        self.activation_post_process: nn.Module = nn.Identity()

    def _get_name(self) -> str:
        return "QFunctional"

    def extra_repr(self) -> str:
        return f"scale={self.scale}, zero_point={self.zero_point}"

    def forward(self, x: Tensor) -> Tensor:
        """Refused: there is no one operation."""
        raise QuantizedTensorError(f"QFunctional {_NO_FORWARD}")

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y."""
        return self._seen(kernels.add(*self._pair(x, y), self.scale, self.zero_point))

    def add_relu(self, x: Tensor, y: Tensor) -> Tensor:
        """relu(x + y)."""
        return self._seen(kernels.add(*self._pair(x, y), self.scale, self.zero_point, relu=True))

    def mul(self, x: Tensor, y: Tensor) -> Tensor:
        """x * y."""
        return self._seen(kernels.multiply(*self._pair(x, y), self.scale, self.zero_point))

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        """x @ y."""
        return kernels.matmul(*self._pair(x, y), self.scale, self.zero_point)

    @door
    def cat(self, x: list[Tensor], dim: int = 0) -> Tensor:
        """One tensor of several."""
        parts = [as_quantized(one, "QFunctional.cat") for one in x]
        return self._seen(kernels.cat(parts, dim, self.scale, self.zero_point))

    def add_scalar(self, x: Tensor, y: float) -> Tensor:
        """x + y, y a number: on the grid of x, moved."""
        return kernels.add_scalar(as_quantized(x, self), y)

    def mul_scalar(self, x: Tensor, y: float) -> Tensor:
        """x * y, y a number: on the grid of x, stretched."""
        return kernels.multiply_scalar(as_quantized(x, self), y)

    def _pair(self, x: Tensor, y: Tensor) -> tuple[Any, Any]:
        return as_quantized(x, self), as_quantized(y, self)

    def _seen(self, result: Tensor) -> Tensor:
        return self.activation_post_process(result)  # type: ignore[no-any-return]

    @classmethod
    @door
    def from_float(cls, mod: FloatFunctional, use_precomputed_fake_quant: bool = False) -> QFunctional:
        """The quantized form of an observed FloatFunctional."""
        made = cls()
        unseen = not getattr(mod.activation_post_process, "has_data", True)
        if not (unseen and mod._takes_numbers):  # which need no grid
            made.scale, made.zero_point = activation_grid(mod)
        return made
