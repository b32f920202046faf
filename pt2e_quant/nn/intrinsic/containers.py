"""Float modules that one quantized module replaces: a product, or a batch norm, and what follows it, in a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ...errors import ConversionError

__all__ = [
    "BNReLU2d",
    "BNReLU3d",
    "ConvAdd2d",
    "ConvAddReLU2d",
    "ConvBn1d",
    "ConvBn2d",
    "ConvBn3d",
    "ConvBnReLU1d",
    "ConvBnReLU2d",
    "ConvBnReLU3d",
    "ConvReLU1d",
    "ConvReLU2d",
    "ConvReLU3d",
    "Fused",
    "FusedModule",
    "LinearBn1d",
    "LinearLeakyReLU",
    "LinearReLU",
    "LinearTanh",
    "container_of",
]


class FusedModule(nn.Module):
    """A module that stands for several: it is observed and replaced as a whole."""


class Fused(FusedModule, nn.Sequential):
    """What the containers have in common.

    parts: classes of the modules, in their order.

    Raises:
        ConversionError: a module of another class is given.
    """

    parts: ClassVar[tuple[type[nn.Module], ...]] = ()

    def __init__(self, *modules: nn.Module) -> None:
        if len(modules) != len(self.parts) or not all(map(isinstance, modules, self.parts)):
            wanted, given = ([kind.__name__ for kind in kinds] for kinds in (self.parts, map(type, modules)))
            raise ConversionError(f"{type(self).__name__} holds {wanted} in this order, got {given}")
        super().__init__(*modules)


class _ConvReLU(Fused):
    def __init__(self, conv: nn.Module, relu: nn.Module) -> None:
        super().__init__(conv, relu)


class ConvReLU1d(_ConvReLU):
    """Conv1d, ReLU."""

    parts = (nn.Conv1d, nn.ReLU)


class ConvReLU2d(_ConvReLU):
    """Conv2d, ReLU."""

    parts = (nn.Conv2d, nn.ReLU)


class ConvReLU3d(_ConvReLU):
    """Conv3d, ReLU."""

    parts = (nn.Conv3d, nn.ReLU)


class _ConvBn(Fused):
    def __init__(self, conv: nn.Module, bn: nn.Module) -> None:
        super().__init__(conv, bn)


class ConvBn1d(_ConvBn):
    """Conv1d, BatchNorm1d; for training."""

    parts = (nn.Conv1d, nn.BatchNorm1d)


class ConvBn2d(_ConvBn):
    """Conv2d, BatchNorm2d; for training."""

    parts = (nn.Conv2d, nn.BatchNorm2d)


class ConvBn3d(_ConvBn):
    """Conv3d, BatchNorm3d; for training."""

    parts = (nn.Conv3d, nn.BatchNorm3d)


class _ConvBnReLU(Fused):
    def __init__(self, conv: nn.Module, bn: nn.Module, relu: nn.Module) -> None:
        super().__init__(conv, bn, relu)


class ConvBnReLU1d(_ConvBnReLU):
    """Conv1d, BatchNorm1d, ReLU; for training."""

    parts = (nn.Conv1d, nn.BatchNorm1d, nn.ReLU)


class ConvBnReLU2d(_ConvBnReLU):
    """Conv2d, BatchNorm2d, ReLU; for training."""

    parts = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)


class ConvBnReLU3d(_ConvBnReLU):
    """Conv3d, BatchNorm3d, ReLU; for training."""

    parts = (nn.Conv3d, nn.BatchNorm3d, nn.ReLU)


class _BNReLU(Fused):
    def __init__(self, batch_norm: nn.Module, relu: nn.Module) -> None:
        super().__init__(batch_norm, relu)


class BNReLU2d(_BNReLU):
    """BatchNorm2d, ReLU."""

    parts = (nn.BatchNorm2d, nn.ReLU)


class BNReLU3d(_BNReLU):
    """BatchNorm3d, ReLU."""

    parts = (nn.BatchNorm3d, nn.ReLU)


class LinearReLU(Fused):
    """Linear, ReLU."""

    parts = (nn.Linear, nn.ReLU)

    def __init__(self, linear: nn.Module, relu: nn.Module) -> None:
        super().__init__(linear, relu)


class LinearBn1d(Fused):
    """Linear, BatchNorm1d; for training."""

    parts = (nn.Linear, nn.BatchNorm1d)

    def __init__(self, linear: nn.Module, bn: nn.Module) -> None:
        super().__init__(linear, bn)


class LinearLeakyReLU(Fused):
    """Linear, LeakyReLU."""

    parts = (nn.Linear, nn.LeakyReLU)

    def __init__(self, linear: nn.Module, leaky_relu: nn.Module) -> None:
        super().__init__(linear, leaky_relu)


class LinearTanh(Fused):
    """Linear, Tanh."""

    parts = (nn.Linear, nn.Tanh)

    def __init__(self, linear: nn.Module, tanh: nn.Module) -> None:
        super().__init__(linear, tanh)


class ConvAdd2d(FusedModule, nn.Sequential):
    """Conv2d, and what adds another tensor to its result."""

    def __init__(self, conv: nn.Module, add: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(conv)
        self.add = add

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:  # type: ignore[override]
        """add(conv(x1), x2)."""
        return self.add(self[0](x1), x2)


class ConvAddReLU2d(ConvAdd2d):
    """Conv2d, what adds another tensor to its result, ReLU."""

    def __init__(self, conv: nn.Module, add: Callable[[Tensor, Tensor], Tensor], relu: nn.Module) -> None:
        super().__init__(conv, add)
        self.relu = relu

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:  # type: ignore[override]
        """relu(add(conv(x1), x2))."""
        return self.relu(super().forward(x1, x2))  # type: ignore[no-any-return]


def container_of(modules: Sequence[nn.Module]) -> Any:
    """The class that holds these modules in this order; None where there is none."""
    fits = (kind for kind in _CONTAINERS if len(kind.parts) == len(modules))
    return next((kind for kind in fits if all(map(isinstance, modules, kind.parts))), None)


_CONTAINERS = [kind for kind in globals().values() if isinstance(kind, type) and issubclass(kind, Fused) and kind.parts]
