"""What a step of a sketch can be: one function for each, from the simplest to the least.

A function looks for operands that fit (`Draft.pick`), and returns without doing anything when there are none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import branch, conv, conv_norm, linear, no_grad, norm, product, remember, reuse, tied, with_constant
from .sketch import Draft, Step, one, rank

__all__ = ["OPS"]

Elementwise = Callable[[Tensor], Any]


# Elementwise ----------------------------------------------------------------------------------------------------------

_CLAMPS: tuple[Elementwise, ...] = (
    F.relu,
    F.relu6,
    lambda x: F.hardtanh(x, -1.0, 1.5),
    lambda x: x.clamp(-0.5, 0.75),
    lambda x: x.clamp(min=0),
    lambda x: x.clamp_max(0.5),
)
_CURVES: tuple[Elementwise, ...] = (
    torch.sigmoid,
    lambda x: torch.softmax(x, -1),
    torch.tanh,
    F.gelu,
    F.hardswish,
    F.silu,
    lambda x: F.leaky_relu(x, 0.2),
    torch.abs,
    lambda x: -x,
    torch.exp,
)
_IN_PLACE: tuple[Elementwise, ...] = (
    lambda x: x.relu_(),
    lambda x: F.relu6(x, inplace=True),
    lambda x: x.mul_(0.5),
    lambda x: x.add_(0.25),
)
_SCALARS: tuple[Elementwise, ...] = (
    lambda x: x + 0.5,
    lambda x: x * 0.3,
    lambda x: x - 1,
    lambda x: 1.5 - x,
    lambda x: x / 3,
    lambda x: x * 2,
)


def _elementwise(options: Sequence[Elementwise], *, fresh: bool = False) -> Callable[[Draft, Step], None]:
    def step(draft: Draft, step: Step) -> None:
        x = draft.pick(step.at, fresh=fresh)
        if x is not None:
            draft.call(one(options, step.variant), x)

    return step


def _dropout(draft: Draft, step: Step) -> None:
    x = draft.pick(step.at)
    if x is not None:
        draft.call(nn.Dropout(0.3), x)


# Two operands ---------------------------------------------------------------------------------------------------------

_PAIRS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    torch.add,
    torch.mul,
    torch.sub,
    lambda a, b: torch.add(a, b, alpha=2),
    torch.maximum,
    lambda a, b: torch.where(a > 0, a, b),
    lambda a, b: a / (b.abs() + 1.0),
)


def _pair(draft: Draft, step: Step) -> None:
    a = draft.pick(step.at)
    if a is None:
        return
    shape = draft.value(a).shape
    b = draft.pick(step.other, lambda value: value.shape == shape)
    if b is not None:
        draft.call(one(_PAIRS, step.variant), a, b)


def _add_in_place(draft: Draft, step: Step) -> None:
    a = draft.pick(step.at, fresh=True)
    if a is None:
        return
    shape = draft.value(a).shape
    b = draft.pick(step.other, lambda value: value.shape == shape)
    if b is not None:
        draft.call(lambda a, b: a.add_(b), a, b)


def _cat(draft: Draft, step: Step) -> None:
    a = draft.pick(step.at, lambda value: value.dim() >= 2)
    if a is None:
        return
    shape = draft.value(a).shape

    def fits(value: Tensor) -> bool:
        return value.dim() == len(shape) and value.shape[:1] == shape[:1] and value.shape[2:] == shape[2:]

    count = 2 + step.variant % 2
    others = [draft.pick(step.other + extra, fits) for extra in range(count - 1)]
    draft.call(lambda *values: torch.cat(values, 1), a, *(other for other in others if other is not None))


def _matmul(draft: Draft, step: Step) -> None:
    a = draft.pick(step.at, rank(3))
    if a is None:
        return
    width = draft.value(a).shape[-1]
    b = draft.pick(step.other, lambda value: value.dim() == 3 and value.shape[-1] == width)
    if b is not None:
        draft.call(lambda a, b: torch.matmul(a, b.transpose(1, 2)), a, b)


def _side_input(draft: Draft, step: Step) -> None:
    x = draft.pick(step.at)
    if x is not None:
        options: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (torch.add, torch.mul)
        draft.call(one(options, step.variant), x, draft.second_input(x))


# Shape and place ------------------------------------------------------------------------------------------------------

_MOVES: tuple[Elementwise, ...] = (
    lambda x: x.flatten(1),
    lambda x: x.transpose(1, -1),
    lambda x: x.reshape(x.shape[0], -1, x.shape[-1]),
    lambda x: x.permute(0, *range(x.dim() - 1, 0, -1)),
    lambda x: x.unsqueeze(1) if x.dim() < 4 else x.squeeze(1),
    lambda x: x[:, 1:] if x.shape[1] > 1 else x[:, :1],
    lambda x: x[:, 0] if x.dim() > 2 else x[:, :1],
    lambda x: x.contiguous().view(x.shape[0], -1),
    lambda x: x[..., ::2],
    lambda x: x.flip(1),
    lambda x: x.expand(2, *x.shape).sum(0) if x.dim() < 3 else x.clone(),
)


def _move(draft: Draft, step: Step) -> None:
    x = draft.pick(step.at, lambda value: value.dim() >= 2)
    if x is not None:
        draft.call(one(_MOVES, step.variant), x)


def _pad(draft: Draft, step: Step) -> None:
    x = draft.pick(step.at, rank(3, 4))
    if x is not None:
        value = one((0.0, 0.0, 0.5), step.variant)
        draft.call(lambda x: F.pad(x, (1, 1) * (x.dim() - 2), value=value), x)


def _pool(draft: Draft, step: Step) -> None:
    x = draft.pick(step.at, lambda value: value.dim() == 4 and min(value.shape[2:]) >= 2)
    if x is not None:
        options: tuple[Elementwise, ...] = (
            lambda x: F.max_pool2d(x, 2),
            lambda x: F.avg_pool2d(x, 2),
            lambda x: F.adaptive_avg_pool2d(x, 1),
            lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
            lambda x: F.max_pool2d(x, 2, ceil_mode=True),
            lambda x: F.adaptive_avg_pool2d(x, (2, 1)),
        )
        draft.call(one(options, step.variant), x)


def _mean(draft: Draft, step: Step) -> None:
    x = draft.pick(step.at, lambda value: value.dim() >= 2)
    if x is not None:
        options: tuple[Elementwise, ...] = (
            lambda x: x.mean(tuple(range(2, x.dim()))) if x.dim() > 2 else x.mean(1, keepdim=True),
            lambda x: x.mean(tuple(range(2, x.dim())), keepdim=True) if x.dim() > 2 else x.mean(0, keepdim=True),
            lambda x: x.mean(-1, keepdim=True),
            lambda x: x.amax(-1, keepdim=True),
            lambda x: x.sum(-1, keepdim=True),
        )
        draft.call(one(options, step.variant), x)


def _split(draft: Draft, step: Step) -> None:
    """An op with several outputs, of which the first two become values."""
    x = draft.pick(step.at, lambda value: value.dim() >= 2 and value.shape[1] >= 2)
    if x is None:
        return
    options: tuple[Elementwise, ...] = (
        lambda x: x.chunk(2, 1),
        lambda x: x.split([1, x.shape[1] - 1], 1),
        lambda x: x.unbind(1)[:2],
        lambda x: x.topk(2, 1),
    )
    parts = draft.call(one(options, step.variant), x)
    if parts is not None:
        for item in (0, 1) if step.variant % len(options) != 3 else (0,):
            draft.call(lambda parts, item=item: parts[item], parts)


# Integers and the rest ------------------------------------------------------------------------------------------------


def _embedding(draft: Draft, step: Step) -> None:
    """Rows of a table, by the integer input or by integers computed from it."""
    table = nn.Embedding(6, 8)
    ids = draft.integers()
    if step.variant % 2:
        moved = draft.call(lambda ids: ids + 1, ids)
        ids = ids if moved is None else moved
    draft.call(table, ids)


def _by_integers(draft: Draft, step: Step) -> None:
    """Integers next to a float value: as an index, as a mask, as a factor."""
    x = draft.pick(step.at, lambda value: value.dim() >= 2)
    if x is None:
        return
    ids = draft.integers()
    if draft.value(ids).shape[0] != draft.value(x).shape[0]:
        return
    options: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
        lambda x, ids: x * ids.view(-1, *[1] * (x.dim() - 1)),
        lambda x, ids: x.index_select(0, ids % x.shape[0]),
        lambda x, ids: x + ids.view(-1, *[1] * (x.dim() - 1)).to(x.dtype),
        lambda x, ids: x.masked_fill((ids > 1).view(-1, *[1] * (x.dim() - 1)), 0.0),
    )
    draft.call(one(options, step.variant), x, ids)


OPS: dict[str, Callable[[Draft, Step], None]] = {
    "relu": _elementwise(_CLAMPS),
    "linear": linear,
    "conv": conv,
    "add": _pair,
    "scalar": _elementwise(_SCALARS),
    "curve": _elementwise(_CURVES),
    "move": _move,
    "cat": _cat,
    "pool": _pool,
    "mean": _mean,
    "dropout": _dropout,
    "conv_norm": conv_norm,
    "norm": norm,
    "reuse": reuse,
    "split": _split,
    "constant": with_constant,
    "pad": _pad,
    "product": product,
    "matmul": _matmul,
    "tied": tied,
    "side_input": _side_input,
    "embedding": _embedding,
    "by_integers": _by_integers,
    "in_place": _elementwise(_IN_PLACE, fresh=True),
    "add_in_place": _add_in_place,
    "no_grad": no_grad,
    "remember": remember,
    "branch": branch,
}
"""Each step by name, simplest first: hypothesis shrinks towards the front."""
