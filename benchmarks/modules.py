"""python -m benchmarks.modules: nn.quantized modules of ours beside torch.ao's (engine x86), one thread.

Both hold the same weights; they take turns, so that a noisy machine is noisy for both. The ratio is of CPU time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import pt2e_quant
from benchmarks.turns import take_turns
from pt2e_quant.nn import intrinsic, quantized

__all__ = ["main"]

ROUNDS = 12


@dataclass(frozen=True)
class Side:
    """Where modules come from."""

    q: ModuleType
    iq: ModuleType
    per_tensor: Callable[..., Tensor]
    per_channel: Callable[..., Tensor]

    def x(self, *shape: int) -> Tensor:
        values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        made = self.per_tensor(values, 1 / 32, 128, torch.quint8)
        return made.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else made

    def filled(self, module: Any, *shape: int) -> Any:
        values = torch.randn(shape, generator=torch.Generator().manual_seed(1)) / torch.Size(shape[1:]).numel() ** 0.5
        scales = values.abs().amax(list(range(1, len(shape)))).double() / 127
        weight = self.per_channel(values, scales, torch.zeros(shape[0]).long(), 0, torch.qint8)
        module.set_weight_bias(weight, torch.zeros(shape[0]))
        module.scale, module.zero_point = 1 / 32, 64
        return module


def ours() -> Side:
    return Side(quantized, intrinsic.quantized, pt2e_quant.quantize_per_tensor, pt2e_quant.quantize_per_channel)


def theirs() -> Side:
    import torch.ao.nn.intrinsic.quantized

    ao = torch.ao.nn
    return Side(ao.quantized, ao.intrinsic.quantized, torch.quantize_per_tensor, torch.quantize_per_channel)


def linear(rows: int, inputs: int, outputs: int) -> Callable[[Side], tuple[Any, Tensor]]:
    return lambda of: (of.filled(of.q.Linear(inputs, outputs), outputs, inputs), of.x(rows, inputs))


def conv(channels: int, size: int) -> Callable[[Side], tuple[Any, Tensor]]:
    def make(of: Side) -> tuple[Any, Tensor]:
        module = of.q.Conv2d(channels, channels, 3, padding=1)
        return of.filled(module, channels, channels, 3, 3), of.x(1, channels, size, size)

    return make


class Block(nn.Module):
    """Two convolutions of 3 x 3 beside a short cut."""

    def __init__(self, of: Side, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = of.filled(of.iq.ConvReLU2d(into, out, 3, stride, 1), out, into, 3, 3)
        self.second = of.filled(of.q.Conv2d(out, out, 3, 1, 1), out, out, 3, 3)
        short = of.filled(of.q.Conv2d(into, out, 1, stride), out, into, 1, 1)
        self.short = short if stride > 1 or into != out else nn.Identity()
        self.sum = of.q.QFunctional()
        self.sum.scale, self.sum.zero_point = 1 / 32, 64

    def forward(self, x: Tensor) -> Tensor:
        return self.sum.add_relu(self.second(self.first(x)), self.short(x))


class ResNet18(nn.Module):
    """ResNet-18 of quantized modules, batch norms folded."""

    def __init__(self, of: Side) -> None:
        super().__init__()
        self.into = of.q.Quantize(1 / 32, 128, torch.quint8)
        self.stem = of.filled(of.iq.ConvReLU2d(3, 64, 7, 2, 3), 64, 3, 7, 7)
        widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
        strides = [1, 1, 2, 1, 2, 1, 2, 1]
        pairs = zip(widths, widths[1:], strides, strict=False)
        self.blocks = nn.Sequential(*(Block(of, a, b, s) for a, b, s in pairs))
        self.last = of.filled(of.q.Linear(512, 1000), 1000, 512)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.stem(self.into(x)), 3, 2, 1)
        x = nn.functional.adaptive_avg_pool2d(self.blocks(x), 1).flatten(1)
        return self.last(x).dequantize()


def resnet(of: Side) -> tuple[Any, Tensor]:
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    return ResNet18(of).eval(), image.contiguous(memory_format=torch.channels_last)


CASES: dict[str, tuple[Callable[[Side], tuple[Any, Tensor]], int]] = {
    "Linear 1 x 64 x 64": (linear(1, 64, 64), 200),
    "Linear 32 x 1024 x 1024": (linear(32, 1024, 1024), 10),
    "Linear 128 x 384 x 1536": (linear(128, 384, 1536), 5),
    "Conv2d 3 x 3, 64 channels, 56 x 56": (conv(64, 56), 5),
    "Conv2d 3 x 3, 256 channels, 14 x 14": (conv(256, 14), 5),
    "ResNet-18, 224 x 224": (resnet, 1),
}
"""What to run, and how often in one timed run: short ones many times."""


def compare(name: str) -> tuple[float, float, float]:
    """(milliseconds of torch.ao's, of ours, the largest difference in steps of the output)."""
    make, repeats = CASES[name]
    sides = {"torch.ao": make(theirs()), "ours": make(ours())}

    def program(side: str) -> Callable[[], Any]:
        module, x = sides[side]
        return lambda: [module(x) for _ in range(repeats)][-1]

    timings = take_turns({side: program(side) for side in sides}, [()] * ROUNDS)
    times = [timings[side].milliseconds()[1] / repeats for side in sides]
    results = [timings[side].answers[-1] for side in sides]
    plain = [one.dequantize() if one.is_quantized else one for one in results]
    return times[0], times[1], float((plain[0] - plain[1]).abs().max()) * 32


def main() -> None:
    warnings.simplefilter("ignore")  # torch's quantized types are deprecated
    torch.set_num_threads(1)
    torch.backends.quantized.engine = "x86"
    print("| case | torch.ao, ms | ours, ms | ratio | largest difference, steps |\n|---|---|---|---|---|")
    for name in CASES:
        theirs_, ours_, steps = compare(name)
        print(f"| {name} | {theirs_:.3f} | {ours_:.3f} | {ours_ / theirs_:.2f} | {steps:.0f} |", flush=True)


if __name__ == "__main__":
    main()
