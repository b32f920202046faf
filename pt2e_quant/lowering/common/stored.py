"""A matrix that is stored as integers, read from its dequantize."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from ...arguments import bind
from ...graph.attributes import constant
from ...specs import FOUR_BITS
from .gemm import Q

__all__ = ["Stored", "stored"]

_FORMS = (Q.dequantize_per_channel.default, Q.dequantize_per_channel_group.default)


@dataclass(frozen=True)
class Stored:
    """A quantized matrix: (codes - zeros) * scales.

    node:   the dequantize that it was read from
    codes:  int8 (rows, columns)
    scales, zeros: float32 (rows, groups in a row)
    four:   codes lie in -8..7
    """

    node: Node
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    four: bool

    @property
    def group(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]


def stored(weight: object) -> Stored | None:
    """What a dequantize reads, when that is a constant matrix with scales for its rows or for groups in them."""
    if not isinstance(weight, Node) or weight.target not in _FORMS:
        return None
    bound = bind(weight)
    codes, scales, zeros = (constant(one) for one in weight.args[:3])
    if codes is None or scales is None or codes.dim() != 2 or codes.dtype is not torch.int8 or bound.get("axis", 0):
        return None
    scales = scales.detach().float().reshape(len(codes), -1)
    zeros = torch.zeros_like(scales) if zeros is None else zeros.detach().float().reshape(scales.shape)
    four = (bound["quant_min"], bound["quant_max"]) == FOUR_BITS and codes.shape[1] % 2 == 0
    return Stored(weight, codes, scales, zeros, four)
