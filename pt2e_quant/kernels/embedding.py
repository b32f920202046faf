"""Rows of a quantized table: looked up as integers, then dequantized, so that only the rows asked for become real."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import QuantizedTensorError
from ..qtensor.tensor import QTensor, door, wrap

__all__ = ["embedding", "embedding_bag"]


@door
def embedding(weight: QTensor, indices: Tensor) -> Tensor:
    """Rows of a table, in float32.

    Args:
        weight: (rows, width) with a scale for each row.
        indices: of any shape, integers.

    Returns:
        (*indices.shape, width).
    """
    flat = indices.reshape(-1)
    return _rows(weight, flat).reshape(*indices.shape, weight.shape[1])


@door
def embedding_bag(
    weight: QTensor,
    indices: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
    compressed_indices_mapping: Tensor | None = None,
    *,
    mode: str = "sum",
    include_last_offset: bool = False,
) -> Tensor:
    """Sums (or means) of rows, in float32.

    Args:
        weight: (rows, width) with a scale for each row.
        indices: (n,) with offsets, or (bags, n) without.
        offsets: where each bag begins.
        per_sample_weights: a factor for each index.
        compressed_indices_mapping: of a pruned table: the row of each index, -1 for one that was pruned.
        mode: 'sum' or 'mean'.
        include_last_offset: the last offset is the end of the last bag.

    Returns:
        (bags, width).
    """
    if compressed_indices_mapping is not None and compressed_indices_mapping.numel() > 1:
        return _pruned(
            weight, indices, offsets, per_sample_weights, compressed_indices_mapping, mode, include_last_offset
        )
    if torch.is_tensor(offsets) and indices.dim() != 1:
        raise QuantizedTensorError(f"with offsets, indices have one dimension; got shape {tuple(indices.shape)}")
    rows = _rows(weight, indices.reshape(-1))
    places = torch.arange(rows.shape[0], device=rows.device).reshape(indices.shape)
    ends = None if offsets is None else offsets.to(places.dtype)
    return F.embedding_bag(
        places, rows, ends, mode=mode, per_sample_weights=per_sample_weights, include_last_offset=include_last_offset
    )


def _pruned(
    weight: QTensor,
    indices: Tensor,
    offsets: Tensor | None,
    factors: Tensor | None,
    mapping: Tensor,
    mode: str,
    last: bool,
) -> Tensor:
    """Rows that were pruned count as zeros: their factor is 0."""
    rows = mapping[indices.long()].long()
    held = (rows >= 0).float()
    factors = held if factors is None else factors * held
    return embedding_bag(weight, rows.clamp(min=0), offsets, factors, mode=mode, include_last_offset=last)


def _rows(weight: QTensor, indices: Tensor) -> Tensor:
    """(n, width) in float32."""
    at = indices.long()
    codes = weight.codes.index_select(0, at)
    if weight.axis is None:
        return wrap(codes, weight.scale, weight.zero_point, None, weight.stored_as, weight.shape[1]).dequantize()
    scales, zeros = weight.q_per_channel_scales()[at], weight.q_per_channel_zero_points()[at]
    return wrap(codes, scales, zeros, 0, weight.stored_as, weight.shape[1]).dequantize()
