"""Small models for the tests, with literals that are nobody's default: eps=1e-3, momentum=0.03, groups, no bias."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["MLP", "ConvNet", "Residual", "export", "randomize", "sqnr"]


def randomize(module: nn.Module, seed: int = 3) -> nn.Module:
    """Batch-norm statistics and parameters other than (0, 1), so that ignoring one shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            if child.running_mean is not None:
                child.running_mean.normal_(0, 0.5, generator=generator)
                child.running_var.uniform_(0.3, 2.0, generator=generator)
            if child.weight is not None:
                nn.init.uniform_(child.weight, 0.5, 1.5, generator=generator)
                nn.init.normal_(child.bias, 0, 0.3, generator=generator)
    return module


def export(module: nn.Module, *inputs: Tensor, train: bool = False, **kwargs: object) -> torch.export.ExportedProgram:
    """Export in eval mode (or train mode); parameters get their final random values first."""
    return torch.export.export(randomize(module).train(train), inputs, **kwargs)


def sqnr(signal: Tensor, other: Tensor) -> float:
    """Power of a signal over that of its difference to another, in dB."""
    signal, other = signal.detach().double(), other.detach().double()
    return float(10 * torch.log10(signal.pow(2).mean() / (signal - other).pow(2).mean()))


class ConvNet(nn.Module):
    """conv('same') + bn + relu, depthwise conv + bn + relu6, pooling, dropout, linear without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding="same", bias=False)
        self.bn1 = nn.BatchNorm2d(12, eps=1e-3, momentum=0.03)
        self.act1 = nn.ReLU(inplace=True)
        self.depthwise = nn.Conv2d(12, 12, (3, 5), stride=2, padding=(1, 2), groups=12)
        self.bn2 = nn.BatchNorm2d(12, eps=1e-2, momentum=0.07)
        self.act2 = nn.ReLU6()
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(0.15)
        self.head = nn.Linear(12, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.stem(x)))
        x = self.act2(self.bn2(self.depthwise(x)))
        x = self.pool(x).mean((2, 3))
        return self.head(self.dropout(x))


class Residual(nn.Module):
    """Two convolutions whose results are added, then relu; a scalar multiply after."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(4, 8, 3, padding=1)
        self.right = nn.Conv2d(4, 8, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.left(x) + self.right(x)) * 0.5


class MLP(nn.Module):
    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.up = nn.Linear(10, width)
        self.act = nn.ReLU()
        self.down = nn.Linear(width, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))
