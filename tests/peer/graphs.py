"""The small graphs on which both engines are run, each with the recipes that it is compared under."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["GRAPHS", "RECIPES", "Graph"]

RECIPES = {
    "per tensor": {"is_per_channel": False},
    "per channel": {"is_per_channel": True},
    "dynamic": {"is_per_channel": True, "is_dynamic": True},
}
STATIC, ALL = ("per tensor", "per channel"), tuple(RECIPES)


class Net(nn.Module):
    """`function(net, *inputs)` as a module; keywords become its submodules and parameters."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


@dataclass(frozen=True)
class Graph:
    """make: builds the module; shapes: of its inputs; recipes: names in RECIPES."""

    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    recipes: tuple[str, ...] = STATIC


def chain(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(layer() for layer in layers))


def _conv_bn_relu() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, eps=1e-3), nn.ReLU())


def _residual() -> nn.Module:
    conv, point = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
    return Net(lambda net, x: torch.relu_(net.point(torch.relu(net.conv(x))) + x), conv=conv, point=point)


def _shared_conv() -> nn.Module:
    conv, point = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
    return Net(lambda net, x: net.point(torch.relu(net.conv(x))) + net.conv(x), conv=conv, point=point)


def _attention_scores() -> nn.Module:
    return Net(lambda net, x, y: net.query(x) @ net.key(y).t(), query=nn.Linear(6, 4), key=nn.Linear(6, 4))


def _qkv() -> nn.Module:
    parts = {name: nn.Linear(6, 4) for name in ("query", "key", "value")}
    return Net(lambda net, x: net.query(x) + net.key(x) * net.value(x), **parts)


IMAGE, PAIR = (1, 3, 8, 8), ((2, 6), (2, 6))

GRAPHS = {
    "conv bn relu": Graph(_conv_bn_relu, (IMAGE,), ALL),
    "conv same, no bias": Graph(lambda: nn.Conv2d(3, 8, 3, padding="same", bias=False), (IMAGE,), ALL),
    "conv strided, dilated": Graph(
        lambda: nn.Conv2d(3, 8, (3, 5), stride=2, padding=(1, 2), dilation=(1, 2), bias=False), ((1, 3, 16, 16),), ALL
    ),
    "conv conv": Graph(chain(lambda: nn.Conv2d(3, 8, 3), lambda: nn.Conv2d(8, 4, 1)), (IMAGE,), ALL),
    "conv relu6": Graph(chain(lambda: nn.Conv2d(3, 8, 3), nn.ReLU6), (IMAGE,), ALL),
    "conv clamp": Graph(lambda: Net(lambda net, x: net.conv(x).clamp(-0.3, 0.4), conv=nn.Conv2d(3, 4, 1)), (IMAGE,)),
    "depthwise conv bn relu": Graph(
        chain(lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), lambda: nn.BatchNorm2d(8), nn.ReLU), ((1, 8, 6, 6),), ALL
    ),
    "grouped conv relu": Graph(
        chain(lambda: nn.Conv2d(8, 8, 3, groups=2), lambda: nn.ReLU(inplace=True)), ((1, 8, 6, 6),), ALL
    ),
    "conv1d bn relu": Graph(chain(lambda: nn.Conv1d(3, 8, 3), lambda: nn.BatchNorm1d(8), nn.ReLU), ((1, 3, 20),), ALL),
    "shared conv": Graph(_shared_conv, ((1, 4, 6, 6),)),
    "transposed conv bn relu": Graph(
        chain(lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), lambda: nn.BatchNorm2d(6), nn.ReLU), ((1, 4, 5, 5),), ALL
    ),
    "transposed conv1d": Graph(lambda: nn.ConvTranspose1d(4, 6, 3), ((1, 4, 9),)),
    "transposed conv, groups": Graph(lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), ((1, 4, 5, 5),)),
    "linear": Graph(lambda: nn.Linear(6, 4), ((2, 6),), ALL),
    "linear relu": Graph(chain(lambda: nn.Linear(6, 4, bias=False), nn.ReLU), ((2, 6),)),
    "linear bn": Graph(chain(lambda: nn.Linear(6, 4), lambda: nn.BatchNorm1d(4)), ((2, 6),)),
    "3-d linear": Graph(chain(lambda: nn.Linear(6, 4), nn.ReLU), ((2, 5, 6),), ALL),
    "mlp": Graph(chain(lambda: nn.Linear(6, 8), nn.ReLU, lambda: nn.Linear(8, 3, bias=False)), ((2, 6),), ALL),
    "mlp, dropout": Graph(chain(lambda: nn.Linear(6, 8), lambda: nn.Dropout(0.3), lambda: nn.Linear(8, 3)), ((2, 6),)),
    "mlp, sigmoid": Graph(chain(lambda: nn.Linear(6, 8), nn.Sigmoid, lambda: nn.Linear(8, 3)), ((2, 6),)),
    "shared linear": Graph(lambda: Net(lambda net, x, y: net.f(x) + net.f(y), f=nn.Linear(6, 4)), PAIR, ALL),
    "qkv": Graph(_qkv, ((2, 6),), ALL),
    "matmul": Graph(lambda: Net(lambda net, x: x @ net.w, w=torch.randn(6, 4)), ((2, 6),), ALL),
    "addmm": Graph(
        lambda: Net(lambda net, x: torch.addmm(net.b, x, net.w), w=torch.randn(6, 4), b=torch.randn(4)), ((2, 6),)
    ),
    "attention scores": Graph(_attention_scores, ((2, 6), (3, 6))),
    "add": Graph(lambda: Net(lambda net, x, y: x + y), PAIR, ALL),
    "add x to x": Graph(lambda: Net(lambda net, x: x + x), ((2, 6),)),
    "residual": Graph(_residual, ((1, 4, 6, 6),)),
    "mul": Graph(lambda: Net(lambda net, x, y: x * y), PAIR),
    "mul relu": Graph(lambda: Net(lambda net, x, y: torch.relu(x * y)), PAIR),
    "mul and add a number": Graph(lambda: Net(lambda net, x: net.f(x) * 0.3 + 1.5, f=nn.Linear(6, 4)), ((2, 6),)),
    "sub": Graph(lambda: Net(lambda net, x, y: x - y), PAIR),
    "cat": Graph(
        lambda: Net(lambda net, x, y: torch.cat([net.f(x), net.g(y)], 1), f=nn.Linear(6, 4), g=nn.Linear(6, 4)), PAIR
    ),
    "cat with an input": Graph(lambda: Net(lambda net, x, y: torch.cat([x, net.f(y)], 1), f=nn.Linear(6, 4)), PAIR),
    "max pool": Graph(chain(lambda: nn.Conv2d(3, 8, 3), nn.ReLU, lambda: nn.MaxPool2d(2)), (IMAGE,)),
    "permute, reshape": Graph(
        lambda: Net(lambda net, x: net.f(net.conv(x).permute(0, 2, 3, 1).reshape(1, 36, 8)), conv=nn.Conv2d(3, 8, 3),
                    f=nn.Linear(8, 4)), (IMAGE,),
    ),
    "pool, flatten, linear": Graph(
        chain(lambda: nn.Conv2d(3, 8, 3), lambda: nn.AdaptiveAvgPool2d(1), nn.Flatten, lambda: nn.Linear(8, 4)),
        (IMAGE,),
    ),
    "pool an input": Graph(chain(lambda: nn.AdaptiveAvgPool2d(1), nn.Flatten, lambda: nn.Linear(3, 4)), (IMAGE,)),
    "mean": Graph(
        lambda: Net(lambda net, x: net.f(net.conv(x).mean((2, 3))), conv=nn.Conv2d(3, 8, 3), f=nn.Linear(8, 4)),
        (IMAGE,),
    ),
}  # fmt: skip
