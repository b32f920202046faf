"""The architectures of torchvision's quantizable nets, small: stubs and functionals of either package are passed in.

Kinds of layers, their order and how branches meet are those of the papers; widths, depths and images are not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NETS", "make"]


def conv(i: int, o: int, k: int = 1, s: int = 1, g: int = 1, act: Any = nn.ReLU) -> nn.Sequential:
    padding = k // 2
    parts = [nn.Conv2d(i, o, k, s, padding, groups=g, bias=False), nn.BatchNorm2d(o)]
    return nn.Sequential(*parts, *([act()] if act else []))


class Residual(nn.Module):
    """ResNet (arXiv:1512.03385): two convolutions, add, relu."""

    def __init__(self, i: int, o: int, s: int, functional: Any) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(i, o, 3, s), conv(o, o, 3, act=None))
        self.down = conv(i, o, 1, s, act=None) if s > 1 else nn.Identity()
        self.sum = functional()

    def forward(self, x: Tensor) -> Any:
        return self.sum.add_relu(self.body(x), self.down(x))


class Inverted(nn.Module):
    """MobileNetV2 (arXiv:1801.04381), with squeeze and excitation and hardswish V3 (arXiv:1905.02244)."""

    def __init__(self, i: int, o: int, s: int, functional: Any, act: Any = nn.ReLU6, squeeze: bool = False) -> None:
        super().__init__()
        self.expand, self.depth = conv(i, 3 * i, act=act), conv(3 * i, 3 * i, 3, s, 3 * i, act)
        gate = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(3 * i, i, 1), nn.ReLU(), nn.Conv2d(i, 3 * i, 1), nn.Hardsigmoid()]
        self.gate = nn.Sequential(*gate) if squeeze else None
        self.project, self.skip = conv(3 * i, o, act=None), s == 1 and i == o
        self.math = functional()
        self.scaled = functional() if squeeze else None

    def forward(self, x: Tensor) -> Any:
        y = self.depth(self.expand(x))
        if self.gate is not None:
            y = self.scaled.mul(self.gate(y), y)  # type: ignore[union-attr]
        y = self.project(y)
        return self.math.add(x, y) if self.skip else y


class Branches(nn.Module):
    """GoogLeNet (arXiv:1409.4842); with factorized convolutions Inception v3 (arXiv:1512.00567)."""

    def __init__(self, i: int, functional: Any, factorized: bool) -> None:
        super().__init__()
        self.one, self.three = conv(i, 8), nn.Sequential(conv(i, 8), conv(8, 8, 3))
        thin = [nn.Conv2d(8, 8, (1, 3), padding=(0, 1)), nn.ReLU(), nn.Conv2d(8, 8, (3, 1), padding=(1, 0)), nn.ReLU()]
        self.five = nn.Sequential(conv(i, 8), *(thin if factorized else [conv(8, 8, 5)]))
        pool = nn.AvgPool2d(3, 1, 1) if factorized else nn.MaxPool2d(3, 1, 1)
        self.pooled, self.cat = nn.Sequential(pool, conv(i, 8)), functional()

    def forward(self, x: Tensor) -> Any:
        return self.cat.cat([self.one(x), self.three(x), self.five(x), self.pooled(x)], 1)


class Shuffled(nn.Module):
    """ShuffleNet v2 (arXiv:1807.11164): half of the channels pass, then halves are interleaved."""

    def __init__(self, i: int, functional: Any) -> None:
        super().__init__()
        half = i // 2
        self.body = nn.Sequential(conv(half, half), conv(half, half, 3, g=half, act=None), conv(half, half))
        self.cat = functional()

    def forward(self, x: Tensor) -> Any:
        left, right = x.chunk(2, 1)
        y = self.cat.cat([left, self.body(right)], 1)
        return y.reshape(y.shape[0], 2, -1, *y.shape[2:]).transpose(1, 2).flatten(1, 2)


Body = Callable[[Any], list[nn.Module]]
NETS: dict[str, Body] = {
    "resnet18": lambda f: [
        conv(3, 16, 3), nn.MaxPool2d(3, 2, 1),
        *(Residual(i, o, s, f) for i, o, s in (
            (16, 16, 1), (16, 16, 1), (16, 24, 2), (24, 24, 1), (24, 32, 2), (32, 32, 1), (32, 48, 2), (48, 48, 1))),
    ],
    "mobilenet_v2": lambda f: [
        conv(3, 16, 3, act=nn.ReLU6), *(Inverted(i, o, s, f) for i, o, s in ((16, 24, 2), (24, 24, 1), (24, 48, 2))),
    ],
    "mobilenet_v3": lambda f: [
        conv(3, 16, 3, act=nn.Hardswish), Inverted(16, 16, 1, f, nn.ReLU, True),
        Inverted(16, 24, 2, f, nn.Hardswish, True), Inverted(24, 48, 1, f, nn.Hardswish),
    ],
    "googlenet": lambda f: [
        conv(3, 16, 7, 2), Branches(16, f, False), nn.MaxPool2d(2), Branches(32, f, False), conv(32, 48),
    ],
    "inception_v3": lambda f: [
        conv(3, 16, 3), Branches(16, f, True), nn.AvgPool2d(2), Branches(32, f, True), conv(32, 48),
    ],
    "shufflenet_v2": lambda f: [conv(3, 24, 3, 2), Shuffled(24, f), Shuffled(24, f), conv(24, 48)],
}  # fmt: skip


class Net(nn.Module):
    def __init__(self, body: Body, quant: Any, dequant: Any, functional: Any) -> None:
        super().__init__()
        self.quant, self.dequant = quant(), dequant()
        self.body, self.head = nn.Sequential(*body(functional)), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Any:
        return self.dequant(self.head(self.body(self.quant(x)).mean((2, 3))))


def make(name: str, quant: Any, dequant: Any, functional: Any) -> Net:
    """A net with random weights, whose batch norms have seen data; the same for both packages."""
    torch.manual_seed(0)
    net = Net(NETS[name], quant, dequant, functional).train()
    with torch.no_grad():
        for _ in range(10):
            net(torch.randn(8, 3, 32, 32))
    return net
