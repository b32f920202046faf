"""Steps of a sketch that have parameters: layers of torch.nn, alone, with batch norm, reused, tied, without gradient.

Like those of `steps`, each looks for an operand that fits and does nothing when there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .sketch import Draft, Step, one, rank

__all__ = [
    "branch",
    "conv",
    "conv_norm",
    "linear",
    "no_grad",
    "norm",
    "product",
    "remember",
    "reuse",
    "tied",
    "with_constant",
]


class _Constant(nn.Module):
    """A parameter next to the value, for each channel of the last dimension."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.function = function
        self.constant = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.constant)


def with_constant(draft: Draft, step: Step) -> None:
    """An operation of the value and a parameter."""
    x = draft.pick(step.at)
    if x is not None:
        options: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
            torch.add,
            torch.mul,
            lambda x, c: c - x,
            lambda x, c: x + torch.softmax(c, 0),
        )
        draft.call(_Constant(one(options, step.variant), draft.value(x).shape[-1]), x)


def conv(draft: Draft, step: Step) -> None:
    """A convolution, transposed or not, on one or two spatial dimensions."""
    x = draft.pick(step.at, rank(3, 4))
    if x is not None:
        draft.call(_convolution(draft.value(x), step.variant), x)


def _convolution(value: Tensor, variant: int) -> nn.Module:
    channels, flat = value.shape[1], value.dim() == 3
    kind: type[nn.Conv1d] | type[nn.Conv2d] = nn.Conv1d if flat else nn.Conv2d
    groups = 2 if channels % 2 == 0 else 1
    options: tuple[Callable[[], nn.Module], ...] = (
        lambda: kind(channels, 6, 1),
        lambda: kind(channels, 4, 3, padding=1),
        lambda: kind(channels, channels, 3, padding="same", bias=False),
        lambda: kind(channels, channels, 3, padding=1, groups=channels),
        lambda: kind(channels, 8, 3, stride=2, padding=1, bias=False),
        lambda: kind(channels, 4, 3, padding=2, dilation=2, groups=groups),
        lambda: (nn.ConvTranspose1d if flat else nn.ConvTranspose2d)(channels, 4, 2),
        lambda: kind(channels, 4, 3, padding=1, padding_mode="reflect" if min(value.shape[2:]) > 1 else "zeros"),
    )
    return one(options, variant)()


class _Norm(nn.Module):
    """A convolution or linear, batch norm with statistics that are nobody's default, and relu."""

    def __init__(self, layer: nn.Module, norm: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm, self.act = layer, norm, act

    def forward(self, x: Tensor) -> Any:
        return self.act(self.norm(self.layer(x)))


def _batch_norm(channels: int, dims: int, variant: int) -> nn.Module:
    kind = nn.BatchNorm2d if dims == 4 else nn.BatchNorm1d
    norm = kind(channels, eps=1e-3, affine=variant % 3 != 2)
    nn.init.normal_(norm.running_mean, 0, 0.5)  # type: ignore[arg-type]
    nn.init.uniform_(norm.running_var, 0.3, 2.0)  # type: ignore[arg-type]
    if norm.affine:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.3)
    return norm


def conv_norm(draft: Draft, step: Step) -> None:
    """A convolution, batch norm after it, and perhaps an activation."""
    x = draft.pick(step.at, rank(3, 4))
    if x is None:
        return
    layer = _convolution(draft.value(x), step.variant)
    channels, dims = int(layer.out_channels), draft.value(x).dim()  # type: ignore[arg-type]
    act = one((nn.Identity, nn.ReLU, nn.ReLU6), step.other)()
    draft.call(_Norm(layer, _batch_norm(channels, dims, step.variant), act), x)


def norm(draft: Draft, step: Step) -> None:
    """Batch norm after whatever there is, so that it can be folded or not; or layer norm."""
    x = draft.pick(step.at, rank(2, 3, 4))
    if x is None:
        return
    shape = draft.value(x).shape
    if step.variant % 3 == 0:
        draft.call(nn.LayerNorm(shape[-1]), x)
    else:
        draft.call(_batch_norm(shape[1], len(shape), step.variant), x)


def linear(draft: Draft, step: Step) -> None:
    """A linear on the last dimension."""
    x = draft.pick(step.at)
    if x is not None:
        options = ((6, True), (4, False), (8, True))
        width, bias = one(options, step.variant)
        draft.call(nn.Linear(draft.value(x).shape[-1], width, bias=bias), x)


class _Product(nn.Module):
    """A linear that is written as a product with a matrix: matmul, addmm and mm of a parameter."""

    def __init__(self, width: int, form: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(width, 5) / width**0.5)
        self.bias = nn.Parameter(torch.randn(5))
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        if self.form == 1 and x.dim() == 2:
            return torch.addmm(self.bias, x, self.matrix)
        return x @ self.matrix if self.form != 2 else x @ self.matrix + self.bias


def product(draft: Draft, step: Step) -> None:
    """A product with a matrix of parameters."""
    x = draft.pick(step.at, lambda value: value.dim() >= 2)
    if x is not None:
        draft.call(_Product(draft.value(x).shape[-1], step.variant % 3), x)


def reuse(draft: Draft, step: Step) -> None:
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


def tied(draft: Draft, step: Step) -> None:
    """Two linears with one weight."""
    x = draft.pick(step.at)
    if x is not None:
        draft.call(_Tied(draft.value(x).shape[-1]), x)


def no_grad(draft: Draft, step: Step) -> None:
    """A region that torch.export captures as a nested graph."""
    x = draft.pick(step.at)
    if x is not None:
        draft.call(_NoGrad(draft.value(x).shape[-1]), x)


class _NoGrad(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            return torch.relu(self.linear(x))


class _Memory(nn.Module):
    """A buffer that every call writes to: a moving average, a count, a cache of the newest rows."""

    def __init__(self, value: Tensor, form: int) -> None:
        super().__init__()
        self.form = form
        self.memory: Tensor
        self.register_buffer("memory", torch.zeros(value.shape[1:]))

    def forward(self, x: Tensor) -> Tensor:
        if self.form == 0:
            self.memory.mul_(0.5).add_(x[0], alpha=0.5)
        elif self.form == 1:
            self.memory.add_(1.0)
        else:
            self.memory[:1] = x[0, :1]
        return x + self.memory


def remember(draft: Draft, step: Step) -> None:
    """Read and write a buffer of the model."""
    x = draft.pick(step.at, rank(2, 3, 4))
    if x is not None:
        draft.call(_Memory(draft.value(x), step.variant % 3), x)


class _Branch(nn.Module):
    """A branch that depends on values, which torch.export keeps as two nested graphs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Any:
        def layer(x: Tensor) -> Any:
            # torch.cond of torch 2.13 cannot compare the strides of a bfloat16 linear on more than two dimensions
            return self.linear(x) if x.dim() == 2 else x * self.linear.bias

        return torch.cond(x.sum() > 0, layer, lambda x: torch.relu(x) * 2, (x,))


def branch(draft: Draft, step: Step) -> None:
    """torch.cond"""
    x = draft.pick(step.at, lambda value: value.is_contiguous())
    if x is not None:
        draft.call(_Branch(draft.value(x).shape[-1]), x)
