"""Every quantized class and function on fixed inputs, written once for our namespace and for torch's.

Inputs are ratios of small integers, so that they are the same numbers on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SCALE, ZERO = 1 / 32, 112
WEIGHT = 1 / 128


def values(*shape: int, seed: int = 0) -> Tensor:
    """Numbers in [-2, 2], in steps of 1/64."""
    count = torch.arange(torch.Size(shape).numel(), dtype=torch.int64)
    return (((count + 1) * 7919 + (seed + 1) * 104729 * (count % 7 + 1)) % 257 - 128).reshape(shape) / 64


@dataclass(frozen=True)
class Space:
    """Where classes and functions come from: pt2e_quant.nn, or torch.ao.nn."""

    q: Any
    iq: Any
    qd: Any
    iqd: Any
    functional: Any
    per_tensor: Callable[..., Tensor]
    per_channel: Callable[..., Tensor]

    def x(self, *shape: int, seed: int = 0) -> Tensor:
        return self.per_tensor(values(*shape, seed=seed), SCALE, ZERO, torch.quint8)

    def weight(self, *shape: int, axis: int | None = 0) -> Tensor:
        if axis is None:
            return self.per_tensor(values(*shape, seed=5) / 4, WEIGHT, 0, torch.qint8)
        scales = (torch.arange(shape[axis]) + 8).double() / 1024
        return self.per_channel(values(*shape, seed=5) / 4, scales, torch.zeros(shape[axis]).long(), axis, torch.qint8)

    def table(self, dtype: torch.dtype) -> Tensor:
        scales, zeros = (torch.arange(10) + 8).float() / 64, (torch.arange(10) + 1).float() / 2
        return self.per_channel(values(10, 12, seed=3), scales, zeros, 0, dtype)


def ours() -> Space:
    import pt2e_quant
    from pt2e_quant.nn import intrinsic, quantized

    inner = intrinsic.quantized
    calls = (pt2e_quant.quantize_per_tensor, pt2e_quant.quantize_per_channel)
    return Space(quantized, inner, quantized.dynamic, inner.dynamic, quantized.functional, *calls)


def theirs() -> Space:
    import torch.ao.nn.intrinsic.quantized.dynamic
    import torch.ao.nn.quantized.dynamic

    q, iq = torch.ao.nn.quantized, torch.ao.nn.intrinsic.quantized
    return Space(q, iq, q.dynamic, iq.dynamic, q.functional, torch.quantize_per_tensor, torch.quantize_per_channel)


Case = Callable[[Space], tuple[Any, tuple[Any, ...]]]
"""From a namespace to a module (or function) and its arguments."""


def _on(module: Any, weight: Tensor, outputs: int, scale: float = 1 / 16, zero_point: int = 100) -> Any:
    module.set_weight_bias(weight, values(outputs, seed=9))
    module.scale, module.zero_point = scale, zero_point
    return module


def _linear(name: str, room: str = "q", *numbers: float) -> Case:
    def case(of: Space) -> Any:
        module = getattr(getattr(of, room), name)(12, 5, *numbers)
        x = of.x(3, 12) if "d" not in room else values(3, 12)
        return _on(module, of.weight(5, 12), 5), (x,)

    return case


def _conv(name: str, dims: int, room: str = "q", **options: Any) -> Case:
    def case(of: Space) -> Any:
        module = getattr(getattr(of, room), name)(4, 6, 3, **{"padding": 1, **options})
        shape = (2, 4, *[5, 4, 3][:dims])
        x = of.x(*shape) if room != "qd" else values(*shape)
        return _on(module, of.weight(6, 4 // module.groups, *[3] * dims), 6), (x,)

    return case


def _conv_add(name: str) -> Case:
    def case(of: Space) -> Any:
        module, (x,) = _conv(name, 2, "iq")(of)
        return module, (x, of.per_tensor(values(2, 6, 5, 4, seed=1), 1 / 48, 90, torch.quint8))

    return case


def _transposed(name: str, dims: int, sizes: tuple[int, int, int] = (4, 4, 3), room: str = "q") -> Case:
    def case(of: Space) -> Any:
        inputs, outputs, kernel = sizes
        module = getattr(getattr(of, room), name)(inputs, outputs, kernel, stride=2)
        shape = (2, inputs, *[4, 3, 2][:dims])
        x = of.x(*shape) if room != "qd" else values(*shape)
        return _on(module, of.weight(inputs, outputs, *[kernel] * dims, axis=None), outputs), (x,)

    return case


def _parameters(count: int) -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(values(count, seed=2).abs() + 0.5), nn.Parameter(values(count, seed=4))


def _batch_norm(name: str, dims: int, room: str = "q") -> Case:
    def case(of: Space) -> Any:
        module = getattr(getattr(of, room), name)(4)
        module.weight, module.bias = _parameters(4)
        module.running_mean.copy_(values(4, seed=6))
        module.running_var.copy_(values(4, seed=7).abs() + 0.5)
        module.scale, module.zero_point = torch.tensor(1 / 32), torch.tensor(100)
        return module, (of.x(2, 4, *[4, 3, 2][:dims]),)

    return case


def _norm(name: str, shape: tuple[int, ...], count: int, *sizes: Any, **options: Any) -> Case:
    def case(of: Space) -> Any:
        return getattr(of.q, name)(*sizes, *_parameters(count), 1 / 32, 120, **options), (of.x(*shape),)

    return case


def _activation(name: str, *arguments: Any) -> Case:
    return lambda of: (getattr(of.q, name)(*arguments), (of.x(2, 4, 5),))


def _prelu(of: Space) -> Any:
    module = of.q.PReLU(1 / 32, 60, 4)
    module.set_weight(of.per_tensor(values(4, seed=2).abs() / 4, 1 / 256, 0, torch.quint8))
    return module, (of.x(2, 4, 5),)


def _embedding(dtype: torch.dtype) -> Case:
    def case(of: Space) -> Any:
        return of.q.Embedding(10, 12, _weight=of.table(dtype), dtype=dtype), (torch.tensor([[1, 2], [9, 0]]),)

    return case


def _bag(dtype: torch.dtype) -> Case:
    def case(of: Space) -> Any:
        module = of.q.EmbeddingBag(10, 12, _weight=of.table(dtype), dtype=dtype, include_last_offset=True)
        return module, (torch.tensor([1, 2, 9, 0, 3]), torch.tensor([0, 2, 5]), values(5, seed=8).abs())

    return case


def _functional(name: str, shape: tuple[int, ...] = (2, 4, 6, 5), **arguments: Any) -> Case:
    return lambda of: (lambda x: getattr(of.functional, name)(x, **arguments), (of.x(*shape),))


def _functional_conv(dims: int) -> Case:
    def case(of: Space) -> Any:
        weight, bias = of.weight(6, 4, *[2] * dims), values(6, seed=9)
        call = getattr(of.functional, f"conv{dims}d")
        grid = {"scale": 1 / 16, "zero_point": 100}
        return lambda x: call(x, weight, bias, padding=1, **grid), (of.x(2, 4, *[4, 3, 2][:dims]),)

    return case


def _functional_linear(of: Space) -> Any:
    weight, bias = of.weight(5, 12), values(5, seed=9)
    return lambda x: of.functional.linear(x, weight, bias, 1 / 16, 100), (of.x(3, 12),)


def _qfunctional(name: str, *numbers: float) -> Case:
    def case(of: Space) -> Any:
        module = of.q.QFunctional()
        module.scale, module.zero_point = 1 / 16, 100
        second = of.per_tensor(values(2, 3, 3, seed=1), 1 / 48, 90, torch.quint8)
        operands: Any = (of.x(2, 3, 3), *(numbers or (second,)))
        return getattr(module, name), (list(operands), 1) if name == "cat" else operands

    return case


MODULES: dict[str, Case] = {
    "Linear": _linear("Linear"),
    "LinearReLU": _linear("LinearReLU", "iq"),
    "LinearLeakyReLU": _linear("LinearLeakyReLU", "iq", 0.125),
    "LinearTanh": _linear("LinearTanh", "iq"),
    **{f"Conv{n}d": _conv(f"Conv{n}d", n) for n in (1, 2, 3)},
    **{f"ConvReLU{n}d": _conv(f"ConvReLU{n}d", n, "iq") for n in (1, 2, 3)},
    "ConvAdd2d": _conv_add("ConvAdd2d"),
    "ConvAddReLU2d": _conv_add("ConvAddReLU2d"),
    "Conv2d, reflect": _conv("Conv2d", 2, padding_mode="reflect"),
    "Conv2d, groups": _conv("Conv2d", 2, groups=2, stride=2),
    "Conv2d, dilation": _conv("Conv2d", 2, dilation=2),
    **{f"ConvTranspose{n}d": _transposed(f"ConvTranspose{n}d", n) for n in (1, 2, 3)},
    **{f"BatchNorm{n}d": _batch_norm(f"BatchNorm{n}d", n) for n in (2, 3)},
    **{f"BNReLU{n}d": _batch_norm(f"BNReLU{n}d", n, "iq") for n in (2, 3)},
    "LayerNorm": _norm("LayerNorm", (2, 4, 5), 5, (5,)),
    "GroupNorm": _norm("GroupNorm", (2, 4, 5), 4, 2, 4),
    **{
        f"InstanceNorm{n}d": _norm(f"InstanceNorm{n}d", (2, 4, *[4, 3, 2][:n]), 4, 4, affine=True) for n in (1, 2, 3)
    },
    "ReLU6": _activation("ReLU6"),
    "Hardswish": _activation("Hardswish", 1 / 32, 30),
    "ELU": _activation("ELU", 1 / 32, 60, 0.75),
    "LeakyReLU": _activation("LeakyReLU", 1 / 32, 60, 0.125),
    "Sigmoid": _activation("Sigmoid", 1 / 256, 0),
    "Softmax": _activation("Softmax", 1, 1 / 256, 0),
    "PReLU": _prelu,
    "Dropout": _activation("Dropout"),
    "Embedding": _embedding(torch.quint8),
    "Embedding, 4 bits": _embedding(torch.quint4x2),
    "EmbeddingBag": _bag(torch.quint8),
    "EmbeddingBag, 4 bits": _bag(torch.quint4x2),
    "Quantize": lambda of: (of.q.Quantize(1 / 32, 100, torch.quint8), (values(3, 4),)),
    "DeQuantize": lambda of: (of.q.DeQuantize(), (of.x(3, 4),)),
}  # fmt: skip
"""Classes whose state dicts go both ways."""

DYNAMIC: dict[str, Case] = {
    "dynamic Linear": _linear("Linear", "qd"),
    "dynamic LinearReLU": _linear("LinearReLU", "iqd"),
    **{f"dynamic Conv{n}d": _conv(f"Conv{n}d", n, "qd") for n in (1, 2, 3)},
    **{f"dynamic ConvTranspose{n}d": _transposed(f"ConvTranspose{n}d", n, room="qd") for n in (1, 2, 3)},
}
"""Float results. torch leaves one bit of the input unused, so that its results are no oracle."""

FUNCTIONS: dict[str, Case] = {
    "avg_pool2d": _functional("avg_pool2d", kernel_size=2),
    "avg_pool2d, padded": _functional("avg_pool2d", kernel_size=3, stride=2, padding=1, count_include_pad=False),
    "avg_pool3d": _functional("avg_pool3d", (1, 2, 4, 4, 4), kernel_size=2),
    "adaptive_avg_pool2d": _functional("adaptive_avg_pool2d", output_size=(3, 2)),
    "adaptive_avg_pool3d": _functional("adaptive_avg_pool3d", (1, 2, 4, 3, 4), output_size=2),
    **{f"conv{n}d": _functional_conv(n) for n in (1, 2, 3)},
    "linear": _functional_linear,
    "interpolate": _functional("interpolate", scale_factor=2.0),
    "interpolate, bilinear": _functional("interpolate", size=(7, 9), mode="bilinear", align_corners=False),
    "max_pool1d": _functional("max_pool1d", (2, 4, 6), kernel_size=2),
    "max_pool2d": _functional("max_pool2d", kernel_size=3, stride=2, padding=1),
    "celu": _functional("celu", scale=1 / 32, zero_point=60, alpha=0.75),
    "leaky_relu": _functional("leaky_relu", negative_slope=0.125),
    "leaky_relu, own grid": _functional("leaky_relu", negative_slope=0.125, scale=1 / 48, zero_point=50),
    "hardtanh": _functional("hardtanh", min_val=-0.5, max_val=0.75),
    "hardswish": _functional("hardswish", scale=1 / 32, zero_point=30),
    "threshold": _functional("threshold", threshold=0.25, value=0.125),
    "elu": _functional("elu", scale=1 / 32, zero_point=60, alpha=0.75),
    "hardsigmoid": _functional("hardsigmoid"),
    "clamp": _functional("clamp", min_=-0.5, max_=0.5),
    "upsample": _functional("upsample", size=8),
    "upsample_bilinear": _functional("upsample_bilinear", size=8),
    "upsample_nearest": _functional("upsample_nearest", size=8),
    **{f"QFunctional.{name}": _qfunctional(name) for name in ("add", "add_relu", "mul", "matmul", "cat")},
    **{f"QFunctional.add_scalar({n})": _qfunctional("add_scalar", n) for n in (0.5, -3.0, 100.0, -200.0)},
    **{f"QFunctional.mul_scalar({n})": _qfunctional("mul_scalar", n) for n in (0.5, -3.0, 0.0)},
}

WRONG_IN_TORCH: dict[str, Case] = {
    "ConvTranspose2d, 8 -> 4": _transposed("ConvTranspose2d", 2, (8, 4, 2)),
    "ConvTranspose1d, 4 -> 6": _transposed("ConvTranspose1d", 1, (4, 6, 3)),
}
"""The exact reference is the oracle (docs/legacy.md)."""
