"""Kinds with parameters: layers of torch.nn, alone, with batch norm, reused, tied, recurrent, with state, in branches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..draft import Draft, Step, one
from .row import Kind, at_least, layer, rank, sized

__all__ = ["CONVOLUTIONS", "LINEARS", "LOOKUPS", "NORMS", "RECURRENT", "SHARED", "STATE"]


class _With(nn.Module):
    """A function of the value and of parameters of given shapes."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.constants = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.constants)


class _First(nn.Module):
    """A layer of which the first result is used, or all of them, the nested ones unpacked."""

    def __init__(self, layer: nn.Module, every: bool = False) -> None:
        super().__init__()
        self.layer, self.every = layer, every

    def forward(self, *inputs: Tensor) -> Any:
        found = self.layer(*inputs)
        return (found[0], *torch.utils._pytree.tree_leaves(found[1])) if self.every else found[0]


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


def _conv(out: int | None, size: int, table: dict[int, Any] = _PLAIN, **options: Any) -> Convolution:
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


def _batch_norm(channels: int, dims: int, variant: int = 0) -> nn.Module:
    """With statistics that are nobody's default."""
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[dims]
    norm = kind(channels, eps=1e-3, affine=variant % 3 != 2)
    nn.init.normal_(norm.running_mean, 0, 0.5)  # type: ignore[arg-type]
    nn.init.uniform_(norm.running_var, 0.3, 2.0)  # type: ignore[arg-type]
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
        lambda x: _batch_norm(x.shape[1], x.dim()), lambda x: _batch_norm(x.shape[1], x.dim(), 2), takes=rank(2, 3, 4, 5)
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
    "local_response_norm": layer(lambda x: nn.LocalResponseNorm(2), takes=rank(3, 4)),
}


# Sharing --------------------------------------------------------------------------------------------------------------


def _reuse(draft: Draft, step: Step) -> None:
    """Call an earlier submodule a second time."""
    x = draft.pick(step.at)
    if x is not None:
        draft.again(step.other, x)


class _Tied(nn.Module):
    """One parameter as the weight of two linears."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Any:
        return self.second(torch.relu(self.first(x)))


class _Twice(nn.Module):
    """One layer called twice in a row, once more beside it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(torch.tanh(self.layer(x))) + self.layer(x * 0.5)


def _side_input(draft: Draft, step: Step) -> None:
    x = draft.pick(step.at, at_least(1))
    if x is not None and draft.value(x).shape[0] == 2:  # the size of a batch
        draft.call(one((torch.add, torch.mul, torch.minimum), step.variant), x, draft.second_input(x))


SHARED: dict[str, Kind] = {
    "reuse": _reuse,
    "tied": layer(lambda x: _Tied(x.shape[-1]), takes=at_least(1)),
    "twice": layer(
        lambda x: _Twice(nn.Linear(x.shape[-1], x.shape[-1])),
        lambda x: _Twice(nn.LayerNorm(x.shape[-1])),
        takes=at_least(2, 2),
    ),
    "normed_weight": layer(
        lambda x: nn.utils.parametrizations.weight_norm(nn.Linear(x.shape[-1], 4)),
        lambda x: nn.utils.parametrizations.spectral_norm(nn.Linear(x.shape[-1], 4)),
        takes=at_least(2),
    ),
    "side_input": _side_input,
}


# Lookups --------------------------------------------------------------------------------------------------------------


def _lookup(make: Callable[[int], nn.Module]) -> Kind:
    """Rows of a table, by the integer input or by integers computed from it."""

    def kind(draft: Draft, step: Step) -> None:
        number = draft.integers()
        if step.variant % 2:
            moved = draft.call(lambda ids: ids + 1, number)
            number = number if moved is None else moved
        draft.call(make(step.variant // 2), number)

    return kind


class _Bag(nn.Module):
    """A sum, mean or maximum of rows for each item."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(6, 8, mode=mode)

    def forward(self, ids: Tensor) -> Any:
        return self.bag(torch.stack([ids, (ids + 1) % 6], 1))


LOOKUPS: dict[str, Kind] = {
    "embedding": _lookup(lambda form: nn.Embedding(6, 8, padding_idx=0 if form else None)),
    "embedding_bag": _lookup(lambda form: _Bag(one(("sum", "mean", "max"), form))),
}


# Recurrent ------------------------------------------------------------------------------------------------------------

RECURRENT: dict[str, Kind] = {
    "rnn": layer(
        lambda x: _First(nn.RNN(x.shape[-1], 5, batch_first=True)),
        lambda x: _First(nn.RNN(x.shape[-1], 5, nonlinearity="relu", bidirectional=True), every=True),
        takes=rank(3),
    ),
    "gru": layer(
        lambda x: _First(nn.GRU(x.shape[-1], 5, batch_first=True), every=True),
        lambda x: _First(nn.GRU(x.shape[-1], 4, num_layers=2, bias=False)),
        takes=rank(3),
    ),
    "lstm": layer(
        lambda x: _First(nn.LSTM(x.shape[-1], 5, batch_first=True), every=True),
        lambda x: _First(nn.LSTM(x.shape[-1], 4, bidirectional=True, proj_size=0)),
        takes=rank(3),
    ),
    "cell": layer(
        lambda x: nn.GRUCell(x.shape[-1], 5),
        lambda x: nn.LSTMCell(x.shape[-1], 5),
        lambda x: nn.RNNCell(x.shape[-1], 5),
        takes=rank(2),
    ),
}


# State and regions ----------------------------------------------------------------------------------------------------


class _Memory(nn.Module):
    """A buffer that every call writes to."""

    def __init__(self, value: Tensor, write: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.write = write
        self.memory: Tensor
        self.register_buffer("memory", torch.zeros(value.shape[1:]))

    def forward(self, x: Tensor) -> Tensor:
        self.write(self.memory, x)
        return x + self.memory


def _memory(write: Callable[[Tensor, Tensor], object]) -> Callable[[Tensor], nn.Module]:
    return lambda x: _Memory(x, write)


class _Shifted(nn.Module):
    """A cache that drops its oldest rows, read before it is written."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.memory: Tensor
        self.register_buffer("memory", torch.zeros(3, *value.shape[1:]))

    def forward(self, x: Tensor) -> Tensor:
        seen = x + self.memory.mean(0)
        self.memory.copy_(torch.cat([self.memory[1:], x[:1]]))
        return seen


class _NoGrad(nn.Module):
    """A region that torch.export captures as a nested graph."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            return torch.relu(self.linear(x))


class _Branch(nn.Module):
    """A branch that depends on values, which torch.export keeps as two nested graphs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Any:
        def layer(x: Tensor) -> Any:
            # torch.cond of torch 2.13 cannot compare the strides of a bfloat16 linear on more than two dimensions
            return self.linear(x) if x.dim() == 2 else x * self.linear.bias

        def other(x: Tensor) -> Tensor:
            return torch.relu(x) * 2

        if not torch.compiler.is_exporting():  # torch.cond compiles both branches before it runs one
            return layer(x) if x.sum() > 0 else other(x)
        return torch.cond(x.sum() > 0, layer, other, (x,))


STATE: dict[str, Kind] = {
    "remember": layer(
        _memory(lambda memory, x: memory.mul_(0.5).add_(x[0], alpha=0.5)),
        _memory(lambda memory, x: memory.add_(1.0)),
        _memory(lambda memory, x: memory[:1].copy_(x[0, :1])),
        _memory(lambda memory, x: torch.add(memory, x[0], out=memory)),
        _memory(lambda memory, x: memory.clamp_(-0.5, 0.5)),
        takes=rank(2, 3, 4),
    ),
    "cache": layer(_Shifted, takes=rank(2, 3, 4)),
    "no_grad": layer(lambda x: _NoGrad(x.shape[-1]), takes=at_least(1)),
    "branch": layer(lambda x: _Branch(x.shape[-1]), takes=lambda value: value.dim() > 0 and value.is_contiguous()),
}
