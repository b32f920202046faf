"""Kinds that bring elements together: sums, extremes, running sums, products of values, pools."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..draft import Draft, Step
from .row import Kind, at_least, op, pair, rank, sized

__all__ = ["POOLS", "PRODUCTS", "REDUCTIONS"]

REDUCTIONS: dict[str, Kind] = {
    "mean": op(
        lambda x: x.mean(tuple(range(2, x.dim()))) if x.dim() > 2 else x.mean(1, keepdim=True),
        lambda x: x.mean(tuple(range(2, x.dim())), keepdim=True) if x.dim() > 2 else x.mean(0, keepdim=True),
        lambda x: x.mean(-1, keepdim=True),
        lambda x: x.amax(-1, keepdim=True),
        lambda x: x.sum(-1, keepdim=True),
        takes=at_least(2),
    ),
    "extreme": op(
        lambda x: x.max(-1)[0],
        lambda x: x.min(1, keepdim=True)[0],
        lambda x: x.amin((-1,)),
        lambda x: torch.stack(x.aminmax(dim=-1), -1),
        lambda x: x.median(-1)[0],
        takes=at_least(2),
    ),
    "argument": op(lambda x: x.argmax(-1), lambda x: x.argmin(1), lambda x: x.max(-1), takes=at_least(2)),
    "product_of_all": op(lambda x: torch.tanh(x).prod(-1), lambda x: torch.logsumexp(x, -1), takes=at_least(2)),
    "variance": op(
        lambda x: x.var(-1, correction=0),
        lambda x: x.std(-1, correction=0, keepdim=True),
        lambda x: torch.var_mean(x, 1, correction=0),
        takes=at_least(2, 2),
    ),
    "length": op(
        lambda x: x.norm(dim=-1),
        lambda x: torch.linalg.vector_norm(x, 1, -1, True),
        lambda x: F.normalize(x, dim=-1),
        lambda x: F.normalize(x, p=1.0, dim=1),
        takes=at_least(2),
    ),
    "running": op(
        lambda x: x.cumsum(-1),
        lambda x: x.cumsum(1),
        lambda x: torch.tanh(x).cumprod(-1),
        lambda x: x.cummax(-1)[0],
        lambda x: x.logcumsumexp(-1),
        lambda x: x.diff(dim=-1),
        takes=at_least(2, 2),
    ),
    "any": op(lambda x: (x > 1).any(-1), lambda x: (x > -9).all(1), lambda x: (x > 0).sum(-1), takes=at_least(2)),
    "count": op(lambda x: x / ((x > 0).sum() + 1), lambda x: x * (x.shape[-1] ** -0.5), takes=at_least(1)),
    "by_hand": op(
        lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, correction=0, keepdim=True) + 0.1),
        lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3),
        takes=at_least(2, 2),
    ),
}


def _matmul(draft: Draft, step: Step) -> None:
    a = draft.pick(step.at, rank(3))
    if a is None:
        return
    width = draft.value(a).shape[-1]
    b = draft.pick(step.other, lambda value: value.dim() == 3 and value.shape[-1] == width)
    if b is not None:
        draft.call(lambda a, b: torch.matmul(a, b.transpose(1, 2)), a, b)


PRODUCTS: dict[str, Kind] = {
    "matmul": _matmul,
    "bmm": pair(
        lambda a, b: torch.bmm(a, b.mT),
        lambda a, b: torch.baddbmm(torch.bmm(a, b.mT), a, b.mT),
        lambda a, b: torch.baddbmm(torch.bmm(a, b.mT), a, b.mT, beta=0.5, alpha=2),
        takes=rank(3),
    ),
    "mm": pair(
        lambda a, b: torch.mm(a, b.t()),
        lambda a, b: torch.addmm(torch.mm(a, b.t()), a, b.t()),
        lambda a, b: torch.addmm(torch.mm(a, b.t()), a, b.t(), beta=0.5, alpha=0.25),
        lambda a, b: F.linear(a, torch.tanh(b)),
        takes=rank(2),
    ),
    "mv": pair(
        lambda a, b: torch.mv(a, b[0]),
        lambda a, b: torch.dot(a[0], b[0]),
        lambda a, b: torch.outer(a[0], b[0]),
        lambda a, b: a @ b[0],
        takes=rank(2),
    ),
    "einsum": pair(
        lambda a, b: torch.einsum("bij,bkj->bik", a, b),
        lambda a, b: torch.einsum("bij,bij->bi", a, b),
        lambda a, b: torch.einsum("bij,cij->bc", a, b),
        takes=rank(3),
    ),
    "einsum_of_images": pair(
        lambda a, b: torch.einsum("nchw,nkhw->nck", a, b), lambda a, b: torch.einsum("nchw,nchw->nhw", a, b),
        takes=rank(4),
    ),
    "matmul_of_images": pair(lambda a, b: a @ b.mT, takes=rank(4)),
    "attention": pair(
        lambda a, b: F.scaled_dot_product_attention(a, b, b),
        lambda a, b: F.scaled_dot_product_attention(a, b, a, is_causal=True),
        lambda a, b: torch.softmax(a @ b.mT * 0.3, -1) @ b,
        lambda a, b: F.scaled_dot_product_attention(a, b, b, attn_mask=a.new_zeros(a.shape[-2], b.shape[-2])),
        takes=rank(3, 4),
    ),
    "distances": pair(lambda a, b: torch.cdist(a.float(), b.float()).to(a.dtype), takes=rank(2, 3)),
}  # fmt: skip

POOLS: dict[str, Kind] = {
    "pool": op(
        lambda x: F.max_pool2d(x, 2),
        lambda x: F.avg_pool2d(x, 2),
        lambda x: F.adaptive_avg_pool2d(x, 1),
        lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
        lambda x: F.max_pool2d(x, 2, ceil_mode=True),
        lambda x: F.adaptive_avg_pool2d(x, (2, 1)),
        lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
        lambda x: F.avg_pool2d(x, 2, ceil_mode=True, divisor_override=3),
        takes=sized(4, least=2),
    ),
    "pool_max": op(
        lambda x: F.adaptive_max_pool2d(x, 2),
        lambda x: F.max_pool2d(x, 2, return_indices=True),
        lambda x: F.max_pool2d(x, 2, dilation=1, stride=1),
        lambda x: F.max_pool2d(x, (2, 1)),
        takes=sized(4, least=2),
    ),
    "pool_flat": op(
        lambda x: F.max_pool1d(x, 2),
        lambda x: F.avg_pool1d(x, 2),
        lambda x: F.adaptive_avg_pool1d(x, 2),
        lambda x: F.adaptive_max_pool1d(x, 2),
        lambda x: F.lp_pool1d(x.abs() + 0.1, 2.0, 2),
        takes=sized(3, least=2),
    ),
    "pool_deep": op(
        lambda x: F.max_pool3d(x, 2),
        lambda x: F.avg_pool3d(x.float(), 2).to(x.dtype),  # there is none for half precision
        lambda x: F.adaptive_avg_pool3d(x, 1),
        takes=sized(5, least=2),
    ),
    "pool_power": op(lambda x: F.lp_pool2d(x.abs() + 0.1, 2.0, 2), takes=sized(4, least=2)),
    "pool_global": op(lambda x: x.mean((-2, -1)), lambda x: x.amax((-2, -1), keepdim=True), takes=rank(4, 5)),
}
