"""Kinds with parameters: linears, convolutions and norms, and what is written by hand in their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..draft import Draft, Step, one
from .row import Kind, at_least, layer, rank, sized

__all__ = ["CONVOLUTIONS", "LINEARS", "NORMS"]


class _With(nn.Module):
    """A function of the value and of parameters of given shapes."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.constants = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.constants)


# Linears --------------------------------------------------------------------------------------------------------------


def _with(function: Callable[..., Tensor], *widths: int | None) -> Callable[[Tensor], nn.Module]:
    """Parameters of one dimension; None stands for the width of the value."""
    return lambda x: _With(function, *((x.shape[-1] if width is None else width,) for width in widths))


def _matrix(function: Callable[..., Tensor], *, transposed: bool = False) -> Callable[[Tensor], nn.Module]:
    """A parameter of the value's width by 5, and one of 5."""
    return lambda x: _With(function, (5, x.shape[-1]) if transposed else (x.shape[-1], 5), (5,))


class _Attention(nn.Module):
    """Self-attention of one layer, with its weights or without."""

    def __init__(self, width: int, weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.weights = weights

    def forward(self, x: Tensor) -> Any:
        return self.attention(x, x, x, need_weights=self.weights)[0]


def _even(value: Tensor) -> bool:
    return value.dim() == 3 and value.shape[-1] % 2 == 0


LINEARS: dict[str, Kind] = {
    "linear": layer(
        lambda x: nn.Linear(x.shape[-1], 6),
        lambda x: nn.Linear(x.shape[-1], 4, bias=False),
        lambda x: nn.Linear(x.shape[-1], 8),
        takes=at_least(1),
    ),
    "product": layer(
        _matrix(lambda x, matrix, bias: x @ matrix),
        _matrix(lambda x, matrix, bias: torch.addmm(bias, x, matrix) if x.dim() == 2 else x @ matrix),
        _matrix(lambda x, matrix, bias: x @ matrix + bias),
        _matrix(lambda x, matrix, bias: F.linear(x, matrix * 0.5, bias), transposed=True),
        _matrix(lambda x, matrix, bias: F.linear(x, matrix) + 0.5 * bias, transposed=True),
        takes=at_least(2),
    ),
    "addmm": layer(
        _matrix(lambda x, matrix, bias: torch.addmm(bias, x, matrix, beta=0.5)),
        _matrix(lambda x, matrix, bias: torch.addmm(bias, x, matrix, alpha=2)),
        _matrix(lambda x, matrix, bias: torch.addmm(bias, x, matrix.t(), beta=0.5, alpha=0.5), transposed=True),
        takes=rank(2),
    ),
    "constant": layer(
        _with(torch.add, None),
        _with(torch.mul, None),
        _with(lambda x, c: c - x, None),
        _with(lambda x, c: x + torch.softmax(c, 0), None),
        _with(lambda x, c: torch.where(c > 0, x, c), None),
        _with(lambda x, c, d: x * c + d, None, None),
        takes=at_least(1),
    ),
    "layer_scale": layer(
        lambda x: _With(lambda x, w, c: x + c * F.linear(x, w), (x.shape[-1], x.shape[-1]), (x.shape[-1],)),
        lambda x: _With(lambda x, w: torch.relu(x + 0.3 * F.linear(x, w)), (x.shape[-1], x.shape[-1])),
        takes=at_least(2),
    ),
    "bilinear": layer(
        lambda x: _With(lambda x, w: F.bilinear(x, torch.tanh(x), w), (3, x.shape[-1], x.shape[-1])), takes=at_least(2)
    ),
    "multihead_attention": layer(
        lambda x: _Attention(x.shape[-1], False), lambda x: _Attention(x.shape[-1], True), takes=_even
    ),
    "encoder_layer": layer(
        lambda x: nn.TransformerEncoderLayer(x.shape[-1], 2, 16, batch_first=True),
        lambda x: nn.TransformerEncoderLayer(x.shape[-1], 2, 16, batch_first=True, norm_first=True, activation="gelu"),
        takes=_even,
    ),
}


# Convolutions ---------------------------------------------------------------------------------------------------------

_PLAIN = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_TRANSPOSED = {3: nn.ConvTranspose1d, 4: nn.ConvTranspose2d, 5: nn.ConvTranspose3d}

Convolution = Callable[[Tensor], nn.Module]


def _conv(out: int | None, size: int | tuple[int, int], table: dict[int, Any] = _PLAIN, **options: Any) -> Convolution:
    """A convolution with so many channels, None for as many as come in; groups=0 stands for one each."""

    def make(x: Tensor) -> nn.Module:
        channels = x.shape[1]
        groups = options.get("groups", 1) or channels
        groups = groups if channels % groups == 0 else 1
        made: nn.Module = table[x.dim()](channels, out or channels, size, **{**options, "groups": groups})
        return made

    return make


_FORMS: tuple[Convolution, ...] = (
    _conv(6, 1),
    _conv(4, 3, padding=1),
    _conv(None, 3, padding="same", bias=False),
    _conv(None, 3, padding=1, groups=0),
    _conv(8, 3, stride=2, padding=1, bias=False),
    _conv(4, 3, padding=2, dilation=2, groups=2),
    _conv(4, 2, _TRANSPOSED),
)
_IMAGES = rank(3, 4, 5)

CONVOLUTIONS: dict[str, Kind] = {
    "conv": layer(*_FORMS, takes=rank(3, 4)),
    "conv_mode": layer(
        _conv(4, 3, padding=1, padding_mode="reflect"),
        _conv(4, 3, padding=1, padding_mode="replicate"),
        _conv(4, 3, padding=1, padding_mode="circular"),
        takes=sized(3, 4, 5, least=2),
    ),
    "conv_transposed": layer(
        _conv(4, 3, _TRANSPOSED, stride=2, padding=1, output_padding=1),
        _conv(None, 2, _TRANSPOSED, groups=2),
        _conv(4, 3, _TRANSPOSED, dilation=2, padding=1, bias=False),
        _conv(None, 3, _TRANSPOSED, groups=0, padding=1),
        takes=_IMAGES,
    ),
    "conv_deep": layer(*_FORMS, takes=rank(5)),
    "conv_valid": layer(
        _conv(5, 2), _conv(8, 2, stride=2, groups=2), _conv(None, (1, 2), groups=0), takes=sized(4, least=2)
    ),
    "conv_shifted": layer(
        lambda x: nn.Sequential(nn.ZeroPad2d((1, 0, 1, 0)), nn.Conv2d(x.shape[1], 4, 2)),
        lambda x: nn.Sequential(nn.ZeroPad2d((-1, 1, 0, 0)), nn.Conv2d(x.shape[1], 4, 1)),
        takes=sized(4, least=2),
    ),
    "separable": layer(
        lambda x: nn.Sequential(_conv(None, 3, padding=1, groups=0)(x), nn.ReLU6(), nn.Conv2d(x.shape[1], 6, 1)),
        takes=rank(4),
    ),
}


# Norms ----------------------------------------------------------------------------------------------------------------


def _batch_norm(channels: int, dims: int, variant: int = 0) -> Any:
    """With statistics that are nobody's default."""
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[dims]
    norm: Any = kind(channels, eps=1e-3, affine=variant % 3 != 2)
    nn.init.normal_(norm.running_mean, 0, 0.5)
    nn.init.uniform_(norm.running_var, 0.3, 2.0)
    return _uneven(norm)


def _uneven(norm: nn.Module) -> Any:
    """Weights and biases that are nobody's default."""
    for name, parameter in norm.named_parameters():
        nn.init.normal_(parameter, 0, 0.3) if name == "bias" else nn.init.uniform_(parameter, 0.5, 1.5)
    return norm


def _conv_norm(draft: Draft, step: Step) -> None:
    """A convolution, batch norm after it, and perhaps an activation."""
    x = draft.pick(step.at, _IMAGES)
    if x is None:
        return
    convolution: Any = one(_FORMS, step.variant)(draft.value(x))
    norm = _batch_norm(convolution.out_channels, draft.value(x).dim(), step.variant)
    act = one((nn.Identity, nn.ReLU, nn.ReLU6, nn.SiLU), step.other)()
    draft.call(nn.Sequential(convolution, norm, act), x)


NORMS: dict[str, Kind] = {
    "conv_norm": _conv_norm,
    "batch_norm": layer(
        lambda x: _batch_norm(x.shape[1], x.dim()),
        lambda x: _batch_norm(x.shape[1], x.dim(), 2),
        takes=rank(2, 3, 4, 5),
    ),
    "linear_norm": layer(
        lambda x: nn.Sequential(nn.Linear(x.shape[-1], 6), _batch_norm(6, 2), nn.ReLU()), takes=rank(2)
    ),
    "layer_norm": layer(
        lambda x: _uneven(nn.LayerNorm(x.shape[-1])),
        lambda x: nn.LayerNorm(x.shape[1:], elementwise_affine=False),
        lambda x: nn.LayerNorm(x.shape[-1], bias=False),
        takes=at_least(2, 2),
    ),
    "group_norm": layer(
        lambda x: _uneven(nn.GroupNorm(2, x.shape[1])),
        lambda x: nn.GroupNorm(1, x.shape[1], affine=False),
        takes=lambda value: value.dim() >= 3 and value.shape[1] % 2 == 0,
    ),
    "instance_norm": layer(
        lambda x: {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}[x.dim()](x.shape[1]),
        lambda x: _uneven(
            {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}[x.dim()](x.shape[1], affine=True)
        ),
        takes=sized(3, 4, 5, least=2),
    ),
    "rms_norm": layer(
        lambda x: _uneven(nn.RMSNorm(x.shape[-1], eps=1e-3)),
        lambda x: nn.RMSNorm(x.shape[-1], elementwise_affine=False),
        takes=at_least(2, 2),
    ),
    "local_response_norm": layer(
        lambda x: _With(lambda x: F.local_response_norm(x.float(), 2).to(x.dtype)), takes=rank(3, 4)
    ),
}
