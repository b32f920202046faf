"""Kinds that compute element by element: activations, curves, numbers as operands, casts, writes in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .row import Kind, at_least, layer, op, pair

__all__ = ["ACTIVATIONS", "CLAMPS", "CURVES", "IN_PLACE", "MIXED", "PAIRS", "SCALARS"]

CLAMPS: dict[str, Kind] = {
    "relu": op(
        F.relu,
        F.relu6,
        lambda x: F.hardtanh(x, -1.0, 1.5),
        lambda x: x.clamp(-0.5, 0.75),
        lambda x: x.clamp(min=0),
        lambda x: x.clamp_max(0.5),
        lambda x: x.clamp_min(-0.25),
    ),
    "threshold": op(lambda x: F.threshold(x, 0.1, -0.5)),
    "clamp_by_tensor": op(lambda x: x.clamp(min=-x.abs().mean(), max=x.abs().mean())),
}

ACTIVATIONS: dict[str, Kind] = {
    "sigmoid": op(torch.sigmoid, F.logsigmoid),
    "tanh": op(torch.tanh, F.tanhshrink),
    "softmax": op(lambda x: torch.softmax(x, -1), lambda x: torch.softmax(x, 0), lambda x: F.softmin(x, dim=-1)),
    "log_softmax": op(lambda x: torch.log_softmax(x, -1)),
    "gelu": op(F.gelu, lambda x: F.gelu(x, approximate="tanh")),
    "hardswish": op(F.hardswish),
    "hardsigmoid": op(F.hardsigmoid),
    "silu": op(F.silu, lambda x: x * torch.sigmoid(x)),
    "leaky_relu": op(lambda x: F.leaky_relu(x, 0.2)),
    "elu": op(F.elu, lambda x: F.elu(x, alpha=0.5)),
    "selu": op(F.selu),
    "celu": op(lambda x: F.celu(x, alpha=0.7)),
    "rrelu": op(lambda x: F.rrelu(x, 0.1, 0.3, training=False)),
    "softplus": op(F.softplus, lambda x: F.softplus(x, beta=2.0, threshold=1.0)),
    "softsign": op(F.softsign),
    "mish": op(F.mish),
    "hardshrink": op(lambda x: F.hardshrink(x, 0.4)),
    "softshrink": op(lambda x: F.softshrink(x, 0.4)),
    "glu": op(lambda x: F.glu(x, -1), takes=lambda value: value.dim() > 0 and value.shape[-1] % 2 == 0),
    "prelu": layer(
        lambda x: nn.PReLU(init=0.1), lambda x: nn.PReLU(x.shape[1] if x.dim() > 1 else 1, init=0.3), takes=at_least(1)
    ),
    "dropout": layer(lambda x: nn.Dropout(0.3), lambda x: nn.AlphaDropout(0.2), lambda x: nn.FeatureAlphaDropout(0.2)),
    "dropout_of_channels": layer(lambda x: nn.Dropout2d(0.2), takes=lambda value: value.dim() == 4),
}

CURVES: dict[str, Kind] = {
    "abs": op(torch.abs),
    "neg": op(lambda x: -x, torch.negative),
    "exp": op(torch.exp, torch.expm1, torch.exp2),
    "log": op(lambda x: torch.log(x.abs() + 0.5), lambda x: torch.log1p(x.abs()), lambda x: torch.log2(x.abs() + 1)),
    "sqrt": op(lambda x: torch.sqrt(x.abs() + 0.1), lambda x: torch.rsqrt(x * x + 1.0)),
    "power": op(lambda x: x**2, lambda x: x**3, lambda x: (x.abs() + 0.1) ** 0.5, torch.square),
    "reciprocal": op(lambda x: torch.reciprocal(x.abs() + 1.0), lambda x: 1.0 / (x * x + 0.5)),
    "sine": op(torch.sin, torch.cos, lambda x: torch.tan(x.clamp(-1.0, 1.0))),
    "arc": op(torch.atan, torch.asinh, lambda x: torch.asin(x.clamp(-0.9, 0.9))),
    "hyperbolic": op(lambda x: torch.sinh(x.clamp(-2, 2)), lambda x: torch.cosh(x.clamp(-2, 2))),
    "erf": op(torch.erf, torch.erfc),
    "round": op(torch.round, torch.floor, torch.ceil, torch.trunc),
    "frac": op(torch.frac, lambda x: x % 1.5, lambda x: torch.fmod(x, 1.5), lambda x: torch.remainder(x, 2.0)),
    "sign": op(torch.sign, lambda x: torch.heaviside(x, x.new_zeros(()))),
    "nan_to_num": op(torch.nan_to_num, lambda x: torch.nan_to_num(x / x.round(), 0.5, 1.0, -1.0)),
    "logit": op(lambda x: torch.logit(torch.sigmoid(x), eps=1e-2)),
}

SCALARS: dict[str, Kind] = {
    "scalar": op(
        lambda x: x + 0.5,
        lambda x: x * 0.3,
        lambda x: x - 1,
        lambda x: 1.5 - x,
        lambda x: x / 3,
        lambda x: x * 2,
        lambda x: torch.add(x, 1.0, alpha=0.5),
        lambda x: torch.rsub(x, 1.0),
    ),
    "scalar_tensor": op(
        lambda x: x * torch.full((), 0.5, dtype=x.dtype),
        lambda x: x + x.mean(),
        lambda x: x / (x.abs().max() + 1.0),
        lambda x: torch.where(x.sum() > 0, x, x * 0.5),
        lambda x: x - torch.zeros_like(x).add(0.25),
    ),
    "constant_tensor": op(
        lambda x: x + torch.arange(x.shape[-1], dtype=x.dtype) * 0.1,
        lambda x: x * torch.linspace(0.5, 1.5, x.shape[-1], dtype=x.dtype),
        lambda x: x + torch.eye(x.shape[-1], dtype=x.dtype)[0],
        lambda x: x * torch.ones_like(x),
        takes=at_least(1),
    ),
}

PAIRS: dict[str, Kind] = {
    "add": pair(
        torch.add,
        torch.mul,
        torch.sub,
        lambda a, b: torch.add(a, b, alpha=2),
        torch.maximum,
        lambda a, b: torch.where(a > 0, a, b),
        lambda a, b: a / (b.abs() + 1.0),
        lambda a, b: torch.sub(a, b, alpha=0.5),
    ),
    "minimum": pair(torch.minimum, torch.fmin, torch.fmax),
    "lerp": pair(lambda a, b: torch.lerp(a, b, 0.3), lambda a, b: torch.lerp(a, b, torch.sigmoid(a))),
    "addcmul": pair(
        lambda a, b: torch.addcmul(a, a, b, value=0.5), lambda a, b: torch.addcdiv(a, b, a.abs() + 1, value=0.3)
    ),
    "angle": pair(lambda a, b: torch.atan2(a, b.abs() + 1.0), lambda a, b: torch.hypot(a, b.abs() + 0.1)),
    "compare": pair(
        lambda a, b: (a > b).to(a.dtype),
        lambda a, b: a * (a <= b),
        lambda a, b: torch.where(torch.logical_and(a > 0, b > 0), a, b * 0.5),
        lambda a, b: ((a >= b) | (b < 0.1)).to(a.dtype) + a,
        lambda a, b: a != b,
        lambda a, b: torch.where(torch.isclose(a, b), a, a + b),
    ),
    "residual": pair(lambda a, b: a + 0.1 * b, lambda a, b: a + torch.sigmoid(b) * a, lambda a, b: a + a + b),
    "distance": pair(
        lambda a, b: F.cosine_similarity(a, b, -1), lambda a, b: F.pairwise_distance(a, b), takes=at_least(2)
    ),
}

IN_PLACE: dict[str, Kind] = {
    "in_place": op(
        lambda x: x.relu_(),
        lambda x: F.relu6(x, inplace=True),
        lambda x: x.mul_(0.5),
        lambda x: x.add_(0.25),
        lambda x: x.clamp_(-1.0, 1.0),
        lambda x: F.leaky_relu_(x, 0.1),
        lambda x: F.silu(x, inplace=True),
        lambda x: F.hardswish(x, inplace=True),
        lambda x: x.sigmoid_(),
        lambda x: x.neg_(),
        fresh=True,
    ),
    "add_in_place": pair(lambda a, b: a.add_(b), lambda a, b: a.mul_(b), lambda a, b: a.sub_(b), fresh=True),
    "copy_in_place": pair(lambda a, b: a.copy_(b), lambda a, b: a.copy_(b * 0.5), fresh=True),
    "fill_in_place": op(lambda x: x.zero_() + 0.5, lambda x: x.fill_(0.3), fresh=True),
    "write_part": op(
        lambda x: x[:, :1].add_(0.5),
        lambda x: x.select(1, 0).mul_(2.0),
        lambda x: x.view(-1)[:3].fill_(0.25) if x.is_contiguous() else x[:1].fill_(0.25),
        lambda x: x.transpose(0, 1).relu_(),
        lambda x: x.narrow(-1, 0, 1).zero_(),
        lambda x: x.chunk(2, 0)[0].neg_(),
        takes=at_least(2),
        fresh=True,
    ),
    "write_through": op(
        lambda x: (x.relu_(), x.add_(0.5), x * 2)[2],
        lambda x: _written(x, 0.5) + x,
        lambda x: torch.add(x, 1.0, out=torch.empty_like(x)),
        fresh=True,
    ),
}


def _written(x: torch.Tensor, value: float) -> torch.Tensor:
    """A view of x, taken before x is written to."""
    view = x.view(x.shape) if x.is_contiguous() else x.unsqueeze(0)[0]
    x.add_(value)
    return view


MIXED: dict[str, Kind] = {
    "through_half": op(
        lambda x: (x.to(torch.float16) * 0.5).to(x.dtype),
        lambda x: torch.relu(x.to(torch.bfloat16)).to(x.dtype),
        lambda x: x.double().add(0.1).to(x.dtype),
    ),
    "ends_in_half": op(lambda x: x.to(torch.float16), lambda x: x.to(torch.bfloat16)),
    "through_integers": op(
        lambda x: (x * 4).to(torch.int32).to(x.dtype) / 4,
        lambda x: (x * 4).to(torch.int64).clamp(-8, 8).to(x.dtype),
        lambda x: (x.abs() * 10).to(torch.uint8).to(x.dtype),
    ),
    "ends_in_integers": op(lambda x: x.long(), lambda x: x > 0.5, lambda x: (x * 3).to(torch.int8)),
    "bool_times": op(
        lambda x: x * (x > -0.5), lambda x: x * (x.abs() < 2).to(x.dtype), lambda x: (x > 0).to(x.dtype) * 2.0 + x
    ),
}
