"""Tables of integers: of those rows that are asked for real numbers are made, and of no others."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ....arguments import bind
from ....graph.write import Symbol, call
from ...common.stored import Stored, stored
from ..limits import MEAN, bags
from .stored import Forms, floats

__all__ = ["rewrite_bag", "rewrite_table"]

aten = torch.ops.aten
_BAG = torch.ops.quantized.embedding_bag_byte_rowwise_offsets.default


def rewrite_table(node: Node, forms: Forms) -> None:
    """Look up codes."""
    table, indices = stored(node.args[0]), node.args[1]
    if table is None:
        return

    def rows(one: Symbol) -> Symbol:
        with forms.write.origin(node):
            return call(node.target, one, indices)  # type: ignore[no-any-return]

    node.replace_all_uses_with(floats(forms, table, node.meta["val"].dtype, rows).node)


def rewrite_bag(node: Node, forms: Forms) -> None:
    """Sums and means of rows, by the kernel of torch for tables of 8 bits with one scale a row.

    A loop that dequantizes the rows before a sum of segments takes 3 to 4 times as long.
    """
    bound = bind(node)
    table, mode, left_out = stored(bound["weight"]), bound["mode"], bound.get("padding_idx")
    if table is None or not _reads_rows_alone(node) or bags(mode, left_out, table.scales.shape[1] != 1) is not None:
        return
    indices, offsets, last, weights = (
        bound[key] for key in ("indices", "offsets", "include_last_offset", "per_sample_weights")
    )
    write, dtype = forms.write, node.meta["val"][0].dtype
    rows = forms.get(f"bags without {left_out}", table, lambda: _rows_of_bytes(table, left_out))
    factors = None if weights is None else write(weights).to(torch.float32)
    value = call(_BAG, rows, indices, offsets, False, 0, False, factors, None, last)
    if mode == MEAN:
        value = value / _sizes_of_bags(write(indices), write(offsets), last)
    for user in list(node.users):
        user.replace_all_uses_with(value.to(dtype).node)


def _reads_rows_alone(node: Node) -> bool:
    """Export writes all four results, three of them for training."""
    read = [user for user in node.users if user.users]
    return all(user.target is operator.getitem and user.args[1] == 0 for user in read)


def _rows_of_bytes(table: Stored, left_out: int | None) -> Tensor:
    """The kernel's rows: codes as uint8, then scale and bias as float32; value = code * scale + bias."""
    raised = (table.codes.to(torch.int16) + 128).to(torch.uint8)
    scales, biases = table.scales.clone(), -(table.zeros + 128.0) * table.scales
    if left_out is not None:
        scales[left_out], biases[left_out] = 0.0, 0.0  # it adds nothing to a sum
    return torch.cat((raised, scales.view(torch.uint8), biases.view(torch.uint8)), dim=1)


def _sizes_of_bags(indices: Symbol, offsets: Symbol, last: bool) -> Any:
    """How many rows each bag has, in a column; 1 for empty ones, whose sum is 0."""
    ends = call(aten.slice.Tensor, offsets, 0, 1)
    if last:
        starts = call(aten.slice.Tensor, offsets, 0, 0, -1)
    else:
        end = call(aten.sym_size.int, indices, 0)
        starts, ends = offsets, call(aten.cat.default, [ends, call(aten.new_full.default, offsets, [1], end)])
    return call(aten.clamp_min.default, ends - starts, 1).unsqueeze(1)
