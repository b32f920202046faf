"""Converted graphs written by hand, so that the tests of lowering depend on no quantizer of ours.

A `Body` is a module around a plain function: what the function computes with `Grid`s and `Weight`s is, once exported,
what a converted graph holds (quantize and dequantize ops, int8 weights as buffers, biases as fp32 parameters).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import pt2e_quant.ops  # noqa: F401  registers torch.ops.quantized_decomposed

Q = torch.ops.quantized_decomposed


@dataclass(frozen=True)
class Grid:
    """Qparams of one tensor: int8, asymmetric, per tensor, as Python numbers."""

    scale: float
    zero_point: int = 0
    qmin: int = -128
    qmax: int = 127
    dtype: torch.dtype = torch.int8

    def quantize(self, x: Tensor) -> Tensor:
        return Q.quantize_per_tensor.default(x, self.scale, self.zero_point, self.qmin, self.qmax, self.dtype)

    def dequantize(self, q: Tensor) -> Tensor:
        return Q.dequantize_per_tensor.default(q, self.scale, self.zero_point, self.qmin, self.qmax, self.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return self.dequantize(self.quantize(x))


class Weight(nn.Module):
    """A folded int8 weight: a buffer followed by dequantize. `axis=None` is one scale for the whole tensor."""

    def __init__(
        self,
        shape: tuple[int, ...],
        axis: int | None = 0,
        *,
        spread: float = 0.004,
        zero_point: int = 0,
        scale_dtype: torch.dtype = torch.float32,
        bounds: tuple[int, int] = (-127, 127),
    ) -> None:
        super().__init__()
        self.axis, self.bounds, self.fixed = axis, bounds, (spread, zero_point)
        self.register_buffer("values", torch.randint(bounds[0], bounds[1] + 1, shape, dtype=torch.int8))
        if axis is not None:
            self.register_buffer("scale", (torch.rand(shape[axis]) * spread + 0.001).to(scale_dtype))
            self.register_buffer("zero_point", torch.full((shape[axis],), zero_point, dtype=torch.int64))

    def forward(self) -> Tensor:
        if self.axis is None:
            return Q.dequantize_per_tensor.default(self.values, *self.fixed, *self.bounds, torch.int8)
        return Q.dequantize_per_channel.default(
            self.values, self.scale, self.zero_point, self.axis, *self.bounds, torch.int8
        )


class Groups(nn.Module):
    """A folded weight of 4 bits (or as `bounds` say) with one scale per group of inputs."""

    def __init__(self, shape: tuple[int, int], size: int, bounds: tuple[int, int] = (-8, 7)) -> None:
        super().__init__()
        self.size, self.bounds = size, bounds
        groups = (shape[0], shape[1] // size)
        self.register_buffer("values", torch.randint(bounds[0], bounds[1] + 1, shape, dtype=torch.int8))
        self.register_buffer("scale", (torch.rand(groups) * 0.02 + 0.001).bfloat16().float())  # XNNPACK keeps bfloat16
        self.register_buffer("zero_point", torch.zeros(groups, dtype=torch.int32))

    def forward(self) -> Tensor:
        return Q.dequantize_per_channel_group.default(
            self.values, self.scale, self.zero_point, *self.bounds, torch.int8, self.size, torch.float32
        )


class Body(nn.Module):
    """`function(self, *inputs)` as a module; keywords become its submodules, parameters and buffers."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.function(self, *inputs, **named)


def bias(size: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(size) * 0.5)


def dynamic(x: Tensor) -> Tensor:
    """Activations quantized at run time, one scale per tensor: choose_qparams.tensor."""
    scale, zero_point = Q.choose_qparams.tensor(x, -128, 127, torch.finfo(torch.float32).eps, torch.int8)
    q = Q.quantize_per_tensor.tensor(x, scale, zero_point, -128, 127, torch.int8)
    return Q.dequantize_per_tensor.tensor(q, scale, zero_point, -128, 127, torch.int8)


def per_token(x: Tensor) -> Tensor:
    """Activations quantized at run time, one scale per row."""
    scale, zero_point = Q.choose_qparams_per_token_asymmetric.default(x, torch.int8)
    q = Q.quantize_per_token.default(x, scale, zero_point, -128, 127, torch.int8)
    return Q.dequantize_per_token.default(q, scale, zero_point, -128, 127, torch.int8, torch.float32)


class Branches(nn.Module):
    """Several bodies side by side, each on an input of its own: one program, lowered once, for a table of rows."""

    def __init__(self, bodies: list[Body]) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(bodies)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(body(x) for body, x in zip(self.bodies, inputs, strict=True))
