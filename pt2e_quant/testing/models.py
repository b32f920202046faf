"""The models on which check_quantizer tries a quantizer when it is given none: small, each with something awkward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

__all__ = ["default_models"]


@functools.cache
def default_models() -> dict[str, ExportedProgram]:
    """Name -> exported model with example inputs; made once, with the same parameters every time."""
    models = {}
    for name, (make, inputs) in _MODELS.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = make().eval().requires_grad_(False)
            models[name] = torch.export.export(model, tuple(value() for value in inputs))
    return models


class _ConvNet(nn.Module):
    """Convolutions (same, depthwise, strided) with batch norm and relu, pooling, mean, dropout, linear without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding="same", bias=False)
        self.norm = nn.BatchNorm2d(8, eps=1e-3)
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
        self.point = nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(12, 4, bias=False)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu6(self.point(self.depthwise(x)))
        x = F.max_pool2d(x, 2).mean((2, 3))
        return self.head(self.dropout(x))


class _Residual(nn.Module):
    """One input read by three, one relu module called twice, sums, a concatenation, numbers as operands; a batch norm
    that cannot be folded, since the convolution before it has another reader."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 1)
        self.norm, self.act = nn.BatchNorm2d(6, eps=1e-2), nn.ReLU()

    def forward(self, x: Tensor) -> Any:
        left, right = self.left(x), self.act(self.right(x))
        both = self.act(left + right)
        return torch.cat([both * 0.5, x, x], 1) + 1, both + both, self.norm(left)


class _MLP(nn.Module):
    """Linears on three dimensions, and an addmm and a matmul of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 6)
        self.matrix, self.bias = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.down(F.relu(self.up(x)))
        return torch.addmm(self.bias, hidden.flatten(0, 1), self.matrix) @ self.matrix.t()


class _Attention(nn.Module):
    """Products of two activations, softmax, layer norm, reshapes in between, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Any:
        def heads(y: Tensor) -> Tensor:
            return y.view(y.shape[0], y.shape[1], 2, 4).permute(0, 2, 1, 3)

        query, key, value = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        scores = torch.softmax(torch.matmul(query, key.transpose(-2, -1)) * 0.5, -1)
        mixed = torch.matmul(scores, value).permute(0, 2, 1, 3).reshape(x.shape)
        return self.norm(x + mixed)


class _Tokens(nn.Module):
    """Integers: ids, arithmetic on ids, an embedding, a boolean mask."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(12, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Any:
        rows = self.table(ids + 1) + self.table(ids)
        return self.head(rows * (ids > 2).unsqueeze(-1)).argmax(-1), self.head(rows)


class _Pieces(nn.Module):
    """Ops with several outputs, slices, a view that is written to, and one that is read by two."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(4, 8, 3, padding=1), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Any:
        left, right = self.conv(x).chunk(2, 1)
        top, where = torch.topk(left.flatten(2), 3, -1)
        gated = (left * torch.sigmoid(right)).relu_()
        return self.linear(gated[:, 1:]) + gated[:, :3], top, where, gated.add_(1.0)


class _Upsampler(nn.Module):
    """Transposed convolutions, convolutions of one dimension, padding with zeros and with others, curves."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2)
        self.flat, self.flat_up = nn.Conv1d(6, 5, 3), nn.ConvTranspose1d(5, 4, 2)

    def forward(self, x: Tensor) -> Any:
        x = torch.tanh(self.up(F.pad(x, (1, 1, 0, 0)))).mean(2)
        return F.hardswish(self.flat_up(F.leaky_relu(self.flat(F.pad(x, (1, 1), value=0.5)))))


class _Weights(nn.Module):
    """One weight for two linears, one linear called twice, a weight computed from parameters, one from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Any:
        y = self.second(F.relu(self.first(self.first(x))))
        return F.linear(self.normed(y), torch.sigmoid(y[:6]))


def _floats(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape)


_MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Callable[[], Tensor], ...]]] = {
    "conv net": (_ConvNet, (_floats(1, 3, 8, 8),)),
    "residual": (_Residual, (_floats(2, 4, 6, 6),)),
    "mlp": (_MLP, (_floats(2, 5, 8),)),
    "attention": (_Attention, (_floats(2, 5, 8),)),
    "tokens": (_Tokens, (lambda: torch.randint(0, 8, (2, 5)),)),
    "pieces": (_Pieces, (_floats(2, 4, 6, 6),)),
    "upsampler": (_Upsampler, (_floats(2, 4, 5, 6),)),
    "weights": (_Weights, (_floats(8, 6),)),
}
