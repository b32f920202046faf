"""Kinds that move values: views, slices, joins, pads, shuffles, gathers and scatters, interpolation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..draft import Draft, Step
from .row import Kind, at_least, ids, op, pair, rank, sized

__all__ = ["INDEXED", "JOINS", "MOVES", "PADS", "PARTS", "RESIZES"]

MOVES: dict[str, Kind] = {
    "move": op(
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
        takes=at_least(2),
    ),
    "slice": op(
        lambda x: x[..., -1:],
        lambda x: x[..., None, 0],
        lambda x: x.narrow(-1, 0, max(1, x.shape[-1] // 2)),
        lambda x: x.select(-1, -1),
        lambda x: x[:1],
        lambda x: x.movedim(0, -1),
        takes=at_least(2),
    ),
    "turn": op(
        lambda x: x.mT if x.dim() > 1 else x,
        lambda x: x.swapaxes(0, 1),
        lambda x: x.rot90(1, (-2, -1)),
        lambda x: x.transpose(0, -1).contiguous(),
        takes=at_least(2),
    ),
    "roll": op(lambda x: x.roll(1, -1), lambda x: x.roll((1, -1), (0, 1)), takes=at_least(2)),
    "flip": op(lambda x: x.flip(-1), lambda x: x.flip(0, 1), torch.fliplr, takes=at_least(2)),
    "repeat": op(
        lambda x: x.repeat(1, 2, *[1] * (x.dim() - 2)),
        lambda x: x.repeat_interleave(2, -1),
        lambda x: x.tile(2),
        takes=at_least(2),
    ),
    "expand": op(
        lambda x: x[:, :1].expand(x.shape),
        lambda x: x.unsqueeze(1).expand(-1, 2, *x.shape[1:]),
        lambda x: x.mean(1, keepdim=True).expand_as(x),
        takes=at_least(2),
    ),
    "as_strided": op(
        lambda x: x.contiguous().as_strided((2, 2), (1, 1)),
        lambda x: x.contiguous().view(-1).unfold(0, 3, 1),
        takes=lambda value: value.numel() >= 3,
    ),
    "triangle": op(
        torch.tril, lambda x: torch.triu(x, 1), lambda x: torch.diagonal(x, 0, -2, -1), lambda x: x.diag_embed(),
        takes=at_least(2),
    ),
    "copy": op(
        torch.clone,
        lambda x: x.contiguous(),
        lambda x: x.detach(),
        lambda x: x.to(memory_format=torch.channels_last) if x.dim() == 4 else x.clone(),
        lambda x: torch.empty_like(x).copy_(x),
        lambda x: torch.ops.aten.alias(x),
    ),
    "flatten": op(torch.flatten, lambda x: x.unflatten(-1, (1, -1)), torch.atleast_3d, lambda x: x.reshape(-1, 1)),
    "scalar_value": op(torch.sum, torch.mean, lambda x: x.max(), lambda x: x.flatten()[0], lambda x: x.norm()),
    "empty": op(
        lambda x: torch.cat([F.relu(x[:, :0]), x], 1),
        lambda x: torch.cat([x, x.new_zeros((x.shape[0], 0, *x.shape[2:]))], 1) * 0.5,
        lambda x: (x, x[:, :0] + 1.0),
        lambda x: x + x[:, :0].sum(),
        takes=at_least(2),
    ),
}  # fmt: skip

PADS: dict[str, Kind] = {
    "pad": op(
        lambda x: F.pad(x, (1, 1) * (x.dim() - 2)),
        lambda x: F.pad(x, (1, 1) * (x.dim() - 2), value=0.5),
        lambda x: F.pad(x, (0, 1)),
        lambda x: F.pad(x, (2, 0), value=-1.0),
        takes=rank(3, 4),
    ),
    "pad_negative": op(
        lambda x: F.pad(x, (-1, 0)),
        lambda x: F.pad(x, (-1, 1)),
        lambda x: F.pad(x, (0, 0, -1, 2)),
        takes=at_least(2, 2),
    ),
    "pad_reflect": op(lambda x: F.pad(x, (1, 1) * (x.dim() - 2), mode="reflect"), takes=sized(3, 4, 5, least=2)),
    "pad_replicate": op(lambda x: F.pad(x, (1, 2) * (x.dim() - 2), mode="replicate"), takes=rank(3, 4, 5)),
    "pad_circular": op(lambda x: F.pad(x, (1, 1) * (x.dim() - 2), mode="circular"), takes=rank(3, 4, 5)),
}

RESIZES: dict[str, Kind] = {
    "interpolate": op(
        lambda x: F.interpolate(x, scale_factor=2),
        lambda x: F.interpolate(x, size=[3] * (x.dim() - 2)),
        lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"),
        lambda x: F.interpolate(x, size=[3] * (x.dim() - 2), mode="area"),
        takes=rank(3, 4, 5),
    ),
    "interpolate_linear": op(
        lambda x: F.interpolate(x, scale_factor=2, mode="linear"),
        lambda x: F.interpolate(x, size=5, mode="linear", align_corners=True),
        takes=rank(3),
    ),
    "interpolate_bilinear": op(
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
        lambda x: F.interpolate(x, size=(5, 3), mode="bilinear", align_corners=True),
        lambda x: F.interpolate(x.float(), size=(3, 3), mode="bilinear", antialias=True).to(x.dtype),
        lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
        takes=rank(4),
    ),
    "interpolate_trilinear": op(lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"), takes=rank(5)),
    "upsample": op(
        lambda x: F.interpolate(x, scale_factor=0.5, recompute_scale_factor=True), takes=sized(4, least=2)
    ),
    "pixel_shuffle": op(
        lambda x: F.pixel_shuffle(x, 2), takes=lambda value: value.dim() == 4 and value.shape[1] % 4 == 0
    ),
    "pixel_unshuffle": op(
        lambda x: F.pixel_unshuffle(x, 2),
        takes=lambda value: value.dim() == 4 and not any(size % 2 for size in value.shape[2:]),
    ),
    "channel_shuffle": op(
        lambda x: F.channel_shuffle(x, 2), takes=lambda value: value.dim() >= 3 and value.shape[1] % 2 == 0
    ),
    "unfold": op(
        lambda x: F.unfold(x, 2),
        lambda x: F.unfold(x, 3, padding=1, stride=2),
        takes=sized(4, least=2),
    ),
    "fold": op(lambda x: F.fold(F.unfold(x, 2, stride=2), x.shape[2:], 2, stride=2), takes=lambda value: (
        value.dim() == 4 and not any(size % 2 for size in value.shape[2:])
    )),
    "windows": op(lambda x: x.unfold(-1, 2, 1), lambda x: x.unfold(1, 2, 2), takes=at_least(2, 2)),
    "grid_sample": op(
        lambda x: F.grid_sample(x, x.new_zeros(1, 3, 2, 2).expand(x.shape[0], -1, -1, -1) + 0.2, align_corners=False),
        takes=rank(4),
    ),
}  # fmt: skip

PARTS: dict[str, Kind] = {
    "split": op(
        lambda x: x.chunk(2, 1),
        lambda x: x.split([1, x.shape[1] - 1], 1),
        lambda x: x.unbind(1)[:2],
        lambda x: x.split(1, -1)[:2],
        lambda x: x.tensor_split(2, 1),
        takes=lambda value: value.dim() >= 2 and value.shape[1] >= 2,
    ),
    "topk": op(
        lambda x: x.topk(2, 1)[0],
        lambda x: x.topk(2, -1),
        lambda x: x.kthvalue(1, -1)[0],
        takes=lambda value: value.dim() >= 2 and min(value.shape[1], value.shape[-1]) >= 2,
    ),
    "sort": op(
        lambda x: x.sort(-1)[0],
        lambda x: x.sort(1, descending=True),
        lambda x: x.argsort(-1),
        lambda x: x.msort(),
        takes=at_least(2),
    ),
    "halves": op(
        lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
        lambda x: x.chunk(2, 1)[0] * torch.sigmoid(x.chunk(2, 1)[1]),
        takes=lambda value: value.dim() >= 2 and value.shape[1] % 2 == 0,
    ),
}


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


JOINS: dict[str, Kind] = {
    "cat": _cat,
    "stack": pair(
        lambda a, b: torch.stack([a, b], 1),
        lambda a, b: torch.stack([a, b], -1),
        lambda a, b: torch.hstack([a, b]),
        takes=at_least(1),
    ),
    "cat_of_branches": op(
        lambda x: torch.cat([F.relu(x), x * 8.0], -1),
        lambda x: torch.cat([torch.sigmoid(x), x, torch.zeros_like(x)], -1),
        takes=at_least(1),
    ),
}


def _mask(x: Tensor, ids: Tensor) -> Tensor:
    return (ids > 1).view(-1, *[1] * (x.dim() - 1))


def _put(x: Tensor, ids: Tensor) -> Any:
    return x.index_put((ids % x.shape[0],), x.new_full((), 0.5))


INDEXED: dict[str, Kind] = {
    "by_integers": ids(
        lambda x, ids: x * ids.view(-1, *[1] * (x.dim() - 1)),
        lambda x, ids: x.index_select(0, ids % x.shape[0]),
        lambda x, ids: x + ids.view(-1, *[1] * (x.dim() - 1)).to(x.dtype),
        lambda x, ids: x.masked_fill(_mask(x, ids), 0.0),
        takes=at_least(2),
    ),
    "masked_fill": ids(
        lambda x, ids: x.masked_fill(_mask(x, ids), -1.0),
        lambda x, ids: torch.where(_mask(x, ids), x, 0.25),
        lambda x, ids: torch.where(_mask(x, ids), x, x.new_zeros(())),
        lambda x, ids: torch.softmax(x.masked_fill(_mask(x, ids), -1e4), 0),
        takes=at_least(2),
    ),
    "masked_by_itself": op(
        lambda x: x.masked_fill(x < 0, 0.1),
        lambda x: torch.where(x > 0.2, x, -x),
        lambda x: torch.where(x > 0, torch.exp(-x), x * 0.5),
    ),
    "gather": ids(
        lambda x, ids: x.gather(1, (ids % x.shape[1]).view(-1, *[1] * (x.dim() - 1)).expand(-1, 1, *x.shape[2:])),
        lambda x, ids: torch.take_along_dim(x, x.argsort(1), 1),
        lambda x, ids: x[torch.arange(x.shape[0]), ids % x.shape[1]],
        lambda x, ids: x[:, ids % x.shape[1]],
        takes=at_least(2),
    ),
    "take": ids(lambda x, ids: x.contiguous().take(ids % 2), lambda x, ids: x.reshape(-1)[ids % 2]),
    "scatter": ids(
        lambda x, ids: x.scatter(1, (ids % x.shape[1]).view(-1, *[1] * (x.dim() - 1)), 0.5),
        lambda x, ids: x.scatter_add(1, (ids % x.shape[1]).view(-1, *[1] * (x.dim() - 1)), x[:, :1]),
        lambda x, ids: torch.zeros_like(x).scatter_reduce(
            1, (ids % x.shape[1]).view(-1, *[1] * (x.dim() - 1)), x, reduce="amax"
        ),
        takes=at_least(2),
    ),
    "index_put": ids(
        _put,
        lambda x, ids: x.index_put((ids % x.shape[0],), x.new_full((), 0.5), accumulate=True),
        lambda x, ids: x.index_add(0, ids % x.shape[0], x),
        lambda x, ids: x.index_copy(0, torch.arange(x.shape[0]), x * 2),
        lambda x, ids: x.index_fill(1, ids[:1] % x.shape[1], 0.0),
        takes=at_least(2),
    ),
    "slice_scatter": pair(
        lambda a, b: a.slice_scatter(b[:, :1], 1, 0, 1),
        lambda a, b: a.select_scatter(b[:, 0], 1, 0),
        lambda a, b: torch.masked_scatter(a, b > 0, b),
        takes=at_least(2),
    ),
    "one_hot": ids(lambda x, ids: x[:, :1].flatten(1)[:, :1] * F.one_hot(ids, 4), takes=at_least(2)),
    "counted": ids(
        lambda x, ids: (x, ids + 1),
        lambda x, ids: (x, ids.cumsum(0)),
        lambda x, ids: (x, ids.float().mean().to(x.dtype)),
    ),
    "bucketize": op(
        lambda x: torch.bucketize(x.contiguous(), torch.tensor([-0.5, 0.0, 0.5], dtype=x.dtype)).to(x.dtype),
        lambda x: torch.searchsorted(torch.tensor([-0.5, 0.5], dtype=x.dtype), x.contiguous()),
    ),
}  # fmt: skip
