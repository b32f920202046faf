"""Kinds that share, remember or repeat: layers called twice, tied weights, tables, recurrences, buffers, branches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..draft import Draft, Step, one
from .row import Kind, at_least, layer, rank

__all__ = ["LOOKUPS", "RECURRENT", "SHARED", "STATE"]

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
        options: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (torch.add, torch.mul, torch.minimum)
        draft.call(one(options, step.variant), x, draft.second_input(x))


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


def _next(ids: Tensor) -> Tensor:
    return ids + 1


def _lookup(make: Callable[[int], nn.Module]) -> Kind:
    """Rows of a table, by the integer input or by integers computed from it."""

    def kind(draft: Draft, step: Step) -> None:
        number = draft.integers()
        if step.variant % 2:
            number = draft.call(_next, number) or number
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


class _First(nn.Module):
    """A layer of which the first result is used, or all of them, the nested ones unpacked."""

    def __init__(self, layer: nn.Module, every: bool = False) -> None:
        super().__init__()
        self.layer, self.every = layer, every

    def forward(self, *inputs: Tensor) -> Any:
        found = self.layer(*inputs)
        return (found[0], *torch.utils._pytree.tree_leaves(found[1])) if self.every else found[0]


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
