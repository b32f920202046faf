"""The models that every foreign quantizer gets, exported as its package asks, with data to calibrate on.

Batch norm has statistics that fold exactly: its factor is a power of two and all else a multiple of 1/256. One engine
folds in float64 and the other in float32; here both come to the same bits, so qparams and integers can be compared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from tests.nets import MLP

__all__ = ["MODELS", "exported"]


class CNN(nn.Module):
    """Convolutions with batch norm and relu or relu6, a residual add, cat, pooling, and a linear with sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8, eps=2**-8)
        self.depthwise = nn.Conv2d(8, 8, (3, 5), padding=(1, 2), groups=8)
        self.bn_depthwise = nn.BatchNorm2d(8, eps=2**-8)
        self.point = nn.Conv2d(8, 4, 1)
        self.pool = nn.MaxPool2d(2)
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = nn.functional.relu6(self.bn_depthwise(self.depthwise(x))) + x
        x = self.pool(torch.cat([self.point(x), x], 1))
        return torch.sigmoid(self.head(torch.flatten(self.squeeze(x), 1)))


class Words(nn.Module):
    """An embedding whose rows are averaged, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, indices: Tensor) -> Tensor:
        return self.head(self.table(indices).mean(1))


class Attention(nn.Module):
    """Layer norm, one head of attention written out, and a residual add."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        weights = torch.softmax(torch.matmul(self.query(y), self.key(y).transpose(1, 2)), -1)
        return x + torch.matmul(weights, self.value(y))


def _numbers(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def _indices(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 20, shape, generator=generator)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], tuple[int, ...]]] = {
    "cnn": (CNN, _numbers, (2, 3, 8, 8)),
    "mlp": (MLP, _numbers, (4, 10)),
    "words": (Words, _indices, (1, 5)),
    "attention": (Attention, _numbers, (2, 4, 8)),
}


def _snap(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Parameters become multiples of 1/256, factors of batch norm powers of two."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.round(parameter * 256) / 256)
        for child in module.modules():
            if isinstance(child, nn.BatchNorm2d):
                powers = torch.tensor([0.25, 1.0, 4.0])
                picked = torch.randint(0, 3, child.running_var.shape, generator=generator)
                child.running_var.copy_(powers[picked] - child.eps)
                child.running_mean.copy_(torch.randint(-128, 128, picked.shape, generator=generator) / 256)
                child.weight.copy_(2.0 ** torch.randint(-1, 2, picked.shape, generator=generator))
                child.bias.copy_(torch.randint(-64, 64, picked.shape, generator=generator) / 256)
    return module


@functools.cache
def exported(name: str, strict: bool = False) -> tuple[ExportedProgram, tuple[tuple[Tensor], ...]]:
    """An exported model and two batches of data; the same ones in every call.

    strict: records which nn.Module or function each op comes from, which some quantizers match on.
    """
    make, data, shape = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make().eval()
    generator = torch.Generator().manual_seed(0)
    batches = tuple((data(shape, generator),) for _ in range(2))
    return torch.export.export(_snap(module, generator), batches[0], strict=strict), batches
