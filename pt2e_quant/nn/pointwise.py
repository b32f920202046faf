"""nn.quantized's activations, Dropout, Quantize and DeQuantize: computed with real numbers, on a grid of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import on_grid
from ..qtensor import QTensor, dequantize, quantize_per_tensor
from ..qtensor.tensor import is_traced
from .observed import activation_grid, as_quantized, quantize_weight, weight_observer

__all__ = [
    "ELU",
    "DeQuantize",
    "Dropout",
    "Hardswish",
    "LeakyReLU",
    "PReLU",
    "Quantize",
    "ReLU6",
    "Sigmoid",
    "Softmax",
]


def grid_of(module: Any) -> Any:
    """(scale, zero_point) of a module that keeps them as buffers: numbers, or while it is traced the buffers."""
    return (module.scale, module.zero_point) if is_traced() else (float(module.scale), int(module.zero_point))


class ReLU6(nn.ReLU):
    """min(max(x, 0), 6) on the grid of the input."""

    def forward(self, input: Tensor) -> Tensor:
        return F.hardtanh(as_quantized(input, self), 0.0, 6.0, self.inplace)

    def _get_name(self) -> str:
        return "QuantizedReLU6"

    @classmethod
    def from_float(cls, mod: Any, use_precomputed_fake_quant: bool = False) -> ReLU6:
        """The quantized form of torch.nn.ReLU6."""
        return cls(mod.inplace)


class _OnBuffers:
    """Activations that keep their grid in buffers."""

    def _keep_grid(self: Any, scale: float, zero_point: int, device: Any, dtype: Any) -> None:
        self.register_buffer("scale", torch.tensor(scale, device=device, dtype=dtype))
        self.register_buffer("zero_point", torch.tensor(zero_point, device=device, dtype=dtype))

    def _round(self: Any, function: Any, input: Tensor) -> QTensor:
        scale, zero_point = grid_of(self)
        return on_grid(function, as_quantized(input, self), scale=scale, zero_point=zero_point)


class Hardswish(_OnBuffers, nn.Hardswish):
    """torch.nn.Hardswish on the grid (scale, zero_point)."""

    def __init__(self, scale: float, zero_point: int, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self._keep_grid(scale, zero_point, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        return self._round(F.hardswish, input)

    def _get_name(self) -> str:
        return "QuantizedHardswish"

    @classmethod
    def from_float(cls, mod: Any, use_precomputed_fake_quant: bool = False) -> Hardswish:
        """The quantized form of an observed torch.nn.Hardswish."""
        return cls(*activation_grid(mod))

    @classmethod
    def from_reference(cls, mod: Any, scale: float, zero_point: int) -> Hardswish:
        """The quantized form of torch.nn.Hardswish, on a grid."""
        return cls(float(scale), int(zero_point))


class LeakyReLU(_OnBuffers, nn.LeakyReLU):
    """torch.nn.LeakyReLU on the grid (scale, zero_point)."""

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

    def _get_name(self) -> str:
        return "QuantizedLeakyReLU"

    @classmethod
    def from_float(cls, mod: Any, use_precomputed_fake_quant: bool = False) -> LeakyReLU:
        """The quantized form of an observed torch.nn.LeakyReLU."""
        return cls(*activation_grid(mod), mod.negative_slope, mod.inplace)

    @classmethod
    def from_reference(cls, mod: Any, scale: float, zero_point: int) -> LeakyReLU:
        """The quantized form of torch.nn.LeakyReLU, on a grid."""
        return cls(float(scale), int(zero_point), mod.negative_slope, mod.inplace)


class ELU(nn.ELU):
    """torch.nn.ELU on the grid (scale, zero_point)."""

    def __init__(self, scale: float, zero_point: int, alpha: float = 1.0) -> None:
        super().__init__(alpha)
        self.scale, self.zero_point = scale, zero_point

    def forward(self, input: Tensor) -> Tensor:
        x = as_quantized(input, self)
        return on_grid(lambda values: F.elu(values, self.alpha), x, scale=self.scale, zero_point=self.zero_point)

    def _get_name(self) -> str:
        return "QuantizedELU"

    @classmethod
    def from_float(cls, mod: Any, use_precomputed_fake_quant: bool = False) -> ELU:
        """The quantized form of an observed torch.nn.ELU."""
        return cls(*activation_grid(mod), mod.alpha)

    @classmethod
    def from_reference(cls, mod: Any, scale: float, zero_point: int) -> ELU:
        """The quantized form of torch.nn.ELU, on a grid."""
        return cls(float(scale), int(zero_point), mod.alpha)


class Sigmoid(nn.Sigmoid):
    """torch.nn.Sigmoid on the grid (output_scale, output_zero_point)."""

    def __init__(self, output_scale: float, output_zero_point: int) -> None:
        super().__init__()
        self.output_scale, self.output_zero_point = output_scale, output_zero_point

    def forward(self, input: Tensor) -> Tensor:
        x = as_quantized(input, self)
        return on_grid(torch.sigmoid, x, scale=self.output_scale, zero_point=self.output_zero_point)

    @classmethod
    def from_float(cls, mod: Any, use_precomputed_fake_quant: bool = False) -> Sigmoid:
        """The quantized form of an observed torch.nn.Sigmoid."""
        return cls(*activation_grid(mod))


class Softmax(nn.Softmax):
    """torch.nn.Softmax on the grid (scale, zero_point)."""

    def __init__(self, dim: int | None = None, scale: float = 1.0, zero_point: int = 0) -> None:
        super().__init__(dim)
        self.scale, self.zero_point = scale, zero_point

    def forward(self, input: Tensor) -> Tensor:
        x = as_quantized(input, self)
        dim = self.dim if self.dim is not None else (0 if x.dim() in (0, 1, 3) else 1)  # torch.nn.Softmax's own choice
        return on_grid(lambda v: torch.softmax(v, dim), x, scale=self.scale, zero_point=self.zero_point)

    def _get_name(self) -> str:
        return "QuantizedSoftmax"

    @classmethod
    def from_float(cls, mod: Any, use_precomputed_fake_quant: bool = False) -> Softmax:
        """The quantized form of an observed torch.nn.Softmax."""
        return cls(mod.dim, *activation_grid(mod))

    @classmethod
    def from_reference(cls, mod: Any, scale: float, zero_point: int) -> Softmax:
        """The quantized form of torch.nn.Softmax, on a grid."""
        return cls(mod.dim, float(scale), int(zero_point))


class PReLU(nn.Module):
    """torch.nn.PReLU with quantized slopes, on the grid (output_scale, output_zero_point)."""

    weight: Tensor

    def __init__(self, output_scale: float, output_zero_point: int, num_parameters: int = 1) -> None:
        super().__init__()
        self.num_parameters = num_parameters
        self.scale, self.zero_point = output_scale, output_zero_point
        self.set_weight(quantize_per_tensor(torch.full((num_parameters,), 0.25), 0.25, 0, torch.quint8))

    def set_weight(self, w: Tensor) -> None:
        """Take other slopes: (num_parameters,), quantized."""
        self.weight = as_quantized(w, "PReLU.set_weight")

    def forward(self, input: Tensor) -> Tensor:
        x, weight = as_quantized(input, self), self.weight.dequantize()
        return on_grid(lambda v: F.prelu(v, weight), x, scale=self.scale, zero_point=self.zero_point)

    def _get_name(self) -> str:
        return "QuantizedPReLU"

    @classmethod
    def from_float(cls, mod: Any, use_precomputed_fake_quant: bool = False) -> PReLU:
        """The quantized form of an observed torch.nn.PReLU."""
        return cls.from_reference(mod, *activation_grid(mod))

    @classmethod
    def from_reference(cls, mod: Any, scale: float, zero_point: int) -> PReLU:
        """The quantized form of torch.nn.PReLU with a qconfig, on a grid."""
        made = cls(float(scale), int(zero_point), mod.num_parameters)
        made.set_weight(quantize_weight(mod.weight, weight_observer(mod, mod)))
        return made


class Dropout(nn.Dropout):
    """Nothing: a quantized model is not trained."""

    def forward(self, input: Tensor) -> Tensor:
        return input

    def _get_name(self) -> str:
        return "QuantizedDropout"

    @classmethod
    def from_float(cls, mod: Any, use_precomputed_fake_quant: bool = False) -> Dropout:
        """The quantized form of torch.nn.Dropout."""
        return cls(mod.p, mod.inplace)

    @classmethod
    def from_reference(cls, mod: Any, scale: float, zero_point: int) -> Dropout:
        """The quantized form of torch.nn.Dropout."""
        return cls(mod.p, mod.inplace)


class Quantize(nn.Module):
    """Real numbers to a QTensor on the grid (scale, zero_point), with codes of `dtype`."""

    scale: Tensor
    zero_point: Tensor

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
    def from_float(mod: Any, use_precomputed_fake_quant: bool = False) -> Quantize:
        """What becomes of an observed QuantStub."""
        return Quantize(*activation_grid(mod), mod.activation_post_process.dtype)

    def extra_repr(self) -> str:
        return f"scale={self.scale}, zero_point={self.zero_point}, dtype={self.dtype}"


class DeQuantize(nn.Module):
    """A QTensor to real numbers."""

    def forward(self, Xq: Tensor) -> Tensor:
        return dequantize(Xq)

    @staticmethod
    def from_float(mod: Any, use_precomputed_fake_quant: bool = False) -> DeQuantize:
        """What becomes of a DeQuantStub."""
        return DeQuantize()
