"""nn.quantized's activations, Dropout, Quantize and DeQuantize: computed with real numbers, on a grid of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import on_grid
from ..qtensor import QTensor, dequantize, quantize_per_tensor
from ..qtensor.tensor import door, is_traced
from .observed import activation_grid, as_quantized, quantize_weight, weight_observer
from .scripting import Unscripted

__all__ = [
    "ELU",
    "DeQuantize",
    "Dropout",
    "Hardswish",
    "LeakyReLU",
    "OnGrid",
    "PReLU",
    "Quantize",
    "ReLU6",
    "Sigmoid",
    "Softmax",
]


def grid_of(module: Any) -> Any:
    """(scale, zero_point) of a module that keeps them as buffers: numbers, or while it is traced the buffers."""
    return (module.scale, module.zero_point) if is_traced() else (float(module.scale), int(module.zero_point))


class OnGrid(Unscripted):
    """What modules have in common that compute with real numbers and round to a grid of their own.

    _KEPT: fields of the float class that are arguments of the quantized one, too.
    _GRID: what its constructor calls scale and zero point.
    """

    _KEPT: ClassVar[tuple[str, ...]] = ()
    _GRID: ClassVar[tuple[str, str]] = ("scale", "zero_point")

    def _get_name(self) -> str:
        return f"Quantized{type(self).__name__}"

    def _keep_grid(self: Any, scale: float, zero_point: int, device: Any, dtype: Any) -> None:
        self.register_buffer("scale", torch.tensor(scale, device=device, dtype=dtype))
        self.register_buffer("zero_point", torch.tensor(zero_point, device=device, dtype=dtype))

    def _grid(self) -> Any:
        return grid_of(self)

    def _round(self, function: Callable[[Tensor], Tensor], input: Tensor, *, relu: bool = False) -> QTensor:
        scale, zero_point = self._grid()
        return on_grid(function, as_quantized(input, self), scale=scale, zero_point=zero_point, relu=relu)

    @classmethod
    @door
    def from_float(cls: Any, mod: Any, use_precomputed_fake_quant: bool = False) -> Any:
        """The quantized form of the observed float class of the same name."""
        return cls.from_reference(mod, *activation_grid(mod))

    @classmethod
    @door
    def from_reference(cls: Any, mod: Any, scale: float, zero_point: int) -> Any:
        """The quantized form of the float class of the same name, on a grid."""
        grid = dict(zip(cls._GRID, (float(scale), int(zero_point)), strict=True))
        return cls(**{name: getattr(mod, name) for name in cls._KEPT}, **grid)


class _OnItsOwn(OnGrid):
    """Those without a grid of their own."""

    @classmethod
    @door
    def from_float(cls: Any, mod: Any, use_precomputed_fake_quant: bool = False) -> Any:
        """The quantized form of the float class of the same name."""
        return cls(*(getattr(mod, name) for name in cls._KEPT))

    @classmethod
    @door
    def from_reference(cls: Any, mod: Any, scale: float, zero_point: int) -> Any:
        """The same; the grid is not needed."""
        return cls.from_float(mod)


class ReLU6(_OnItsOwn, nn.ReLU):
    """min(max(x, 0), 6) on the grid of the input."""

    _KEPT = ("inplace",)

    @door
    def __init__(self, inplace: bool = False) -> None:
        super().__init__(inplace)

    def forward(self, input: Tensor) -> Tensor:
        return F.hardtanh(as_quantized(input, self), 0.0, 6.0, self.inplace)


class Dropout(_OnItsOwn, nn.Dropout):
    """Nothing: a quantized model is not trained."""

    _KEPT = ("p", "inplace")

    @door
    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        super().__init__(p, inplace)

    def forward(self, input: Tensor) -> Tensor:
        return input


class Hardswish(OnGrid, nn.Hardswish):
    """torch.nn.Hardswish on the grid (scale, zero_point)."""

    @door
    def __init__(self, scale: float, zero_point: int, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self._keep_grid(scale, zero_point, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        return self._round(F.hardswish, input)


class LeakyReLU(OnGrid, nn.LeakyReLU):
    """torch.nn.LeakyReLU on the grid (scale, zero_point)."""

    _KEPT = ("negative_slope", "inplace")

    @door
    def __init__(
        self,
        scale: float,
        zero_point: int,
        negative_slope: float = 1e-2,
        inplace: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(negative_slope, inplace)
        self._keep_grid(scale, zero_point, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        return self._round(lambda x: F.leaky_relu(x, self.negative_slope), input)


class ELU(OnGrid, nn.ELU):
    """torch.nn.ELU on the grid (scale, zero_point)."""

    _KEPT = ("alpha",)

    @door
    def __init__(self, scale: float, zero_point: int, alpha: float = 1.0) -> None:
        super().__init__(alpha)
        self.scale, self.zero_point = scale, zero_point

    def forward(self, input: Tensor) -> Tensor:
        return self._round(lambda x: F.elu(x, self.alpha), input)


class Sigmoid(OnGrid, nn.Sigmoid):
    """torch.nn.Sigmoid on the grid (output_scale, output_zero_point)."""

    _GRID = ("output_scale", "output_zero_point")

    @door
    def __init__(self, output_scale: float, output_zero_point: int) -> None:
        super().__init__()
        self.output_scale, self.output_zero_point = output_scale, output_zero_point

    def _get_name(self) -> str:
        return "Sigmoid"  # as the reference's, which alone does not say Quantized

    def _grid(self) -> Any:
        return self.output_scale, self.output_zero_point

    def forward(self, input: Tensor) -> Tensor:
        return self._round(torch.sigmoid, input)


class Softmax(OnGrid, nn.Softmax):
    """torch.nn.Softmax on the grid (scale, zero_point)."""

    _KEPT = ("dim",)

    @door
    def __init__(self, dim: int | None = None, scale: float = 1.0, zero_point: int = 0) -> None:
        super().__init__(dim)
        self.scale, self.zero_point = scale, zero_point

    def forward(self, input: Tensor) -> Tensor:
        dims = as_quantized(input, self).dim()
        dim = self.dim if self.dim is not None else (0 if dims in (0, 1, 3) else 1)  # torch.nn.Softmax's own choice
        return self._round(lambda x: torch.softmax(x, dim), input)


class PReLU(OnGrid, nn.Module):
    """torch.nn.PReLU with quantized slopes, on the grid (output_scale, output_zero_point)."""

    _KEPT = ("num_parameters",)
    _GRID = ("output_scale", "output_zero_point")
    weight: Tensor

    @door
    def __init__(self, output_scale: float, output_zero_point: int, num_parameters: int = 1) -> None:
        super().__init__()
        self.num_parameters = num_parameters
        self.scale, self.zero_point = output_scale, output_zero_point
        self.set_weight(quantize_per_tensor(torch.full((num_parameters,), 0.25), 0.25, 0, torch.quint8))

    @door
    def set_weight(self, w: Tensor) -> None:
        """Take other slopes: (num_parameters,), quantized."""
        self.weight = as_quantized(w, "PReLU.set_weight")

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.dequantize()
        return self._round(lambda x: F.prelu(x, weight), input)

    @classmethod
    @door
    def from_reference(cls, mod: Any, scale: float, zero_point: int) -> PReLU:
        """The quantized form of torch.nn.PReLU with a qconfig, on a grid."""
        made: PReLU = super().from_reference(mod, scale, zero_point)
        made.set_weight(quantize_weight(mod.weight, weight_observer(mod, mod)))
        return made


class Quantize(Unscripted, nn.Module):
    """Real numbers to a QTensor on the grid (scale, zero_point), with codes of `dtype`."""

    scale: Tensor
    zero_point: Tensor

    @door
    def __init__(
        self, scale: float, zero_point: int, dtype: torch.dtype, factory_kwargs: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        options = dict(factory_kwargs or {})
        self.register_buffer("scale", torch.tensor([scale], **options))
        options.pop("dtype", None)
        self.register_buffer("zero_point", torch.tensor([zero_point], dtype=torch.long, **options))
        self.dtype = dtype

    def forward(self, X: Tensor) -> Tensor:
        scale, zero_point = grid_of(self)
        return quantize_per_tensor(X, scale, zero_point, self.dtype)

    @staticmethod
    @door
    def from_float(mod: Any, use_precomputed_fake_quant: bool = False) -> Quantize:
        """What becomes of an observed QuantStub."""
        return Quantize(*activation_grid(mod), mod.activation_post_process.dtype)

    def extra_repr(self) -> str:
        return f"scale={self.scale}, zero_point={self.zero_point}, dtype={self.dtype}"


class DeQuantize(Unscripted, nn.Module):
    """A QTensor to real numbers."""

    def forward(self, Xq: Tensor) -> Tensor:
        return dequantize(Xq)

    @staticmethod
    @door
    def from_float(mod: Any, use_precomputed_fake_quant: bool = False) -> DeQuantize:
        """What becomes of a DeQuantStub."""
        return DeQuantize()
