"""Integer weights beside float values, for Inductor: linears with float inputs, and tables that are looked up.

Weights and tables stay integers in memory and in packages, those of 4 bits two in a byte. In bfloat16, linears become
the kernels that torch has for them. In float32 and float16 the same kernels use no vector instructions and take 2 to 60
times as long (torch 2.13, batches of 1 to 128) as a loop that dequantizes the weight before an ordinary product,
so there the graph gets that loop. Of a table, the rows that are asked for are dequantized, and no others.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ...arguments import bind
from ...graph.attributes import constant, free_name, insert_attribute
from ...graph.module import tidy
from ...graph.write import emit
from ...ops import LINEAR, is_dequantize
from ..common.gemm import Gemm, Q, as_gemm

__all__ = ["integer_weights", "remarks_on_speed"]

aten = torch.ops.aten
_INT8, _INT4 = aten._weight_int8pack_mm.default, aten._weight_int4pack_mm_for_cpu.default
_BAG = torch.ops.quantized.embedding_bag_byte_rowwise_offsets.default
_PER_ROW, _PER_GROUP = Q.dequantize_per_channel.default, Q.dequantize_per_channel_group.default
_SUM, _MEAN = 0, 1

_GROUPS = (32, 64, 128, 256)
"""Group sizes of the kernel for 4 bits."""

_ROWS = 16
"""The kernel for 4 bits takes outputs by 16. That for 8 bits needs more than 8: up to 8 scales are numbers in the code
that Inductor 2.13 writes, where a kernel cannot read them."""

_COLUMNS = 16
"""The kernel for 8 bits reads weights by 16: with other numbers of inputs it returns wrong ones, or crashes."""


@dataclass(frozen=True)
class _Stored:
    """A quantized matrix: (codes - zeros) * scales.

    codes: int8 (rows, columns); scales, zeros: float32 (rows, groups in a row); four: codes lie in -8..7
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    four: bool

    @property
    def group(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]


def integer_weights(gm: GraphModule) -> GraphModule:
    """Multiply by and look up integers where a graph dequantizes a whole constant matrix."""
    made = _Constants(gm)
    for node in list(gm.graph.nodes):
        rewrite = _REWRITES.get(node.target)
        if rewrite is None:
            continue
        with gm.graph.inserting_before(node):
            rewrite(node, made)
    return tidy(gm)


def remarks_on_speed(gm: GraphModule) -> Iterator[tuple[Node, str]]:
    """Which operators save memory and no time."""
    for node in gm.graph.nodes:
        gemm = as_gemm(node)
        if gemm is None or node.target not in LINEAR or is_dequantize(gemm.activation):
            continue
        dtype = str(gemm.weight.meta["val"].dtype).removeprefix("torch.")
        if dtype != "bfloat16":
            yield node, f"its weight becomes {dtype} in every run, so it saves memory and no time; bfloat16 has kernels"


class _Constants:
    """New constants of a graph: one for each tensor, however many nodes read it."""

    def __init__(self, gm: GraphModule) -> None:
        self._gm = gm
        self._names = free_name(gm, "_integers_")
        self._made: dict[tuple[str, int], Node] = {}

    def get(self, use: str, like: Node, source: Tensor, make: Callable[[], Tensor]) -> Node:
        """The node of `make()`, a form of `source` for some use; made at the insertion point when first asked for."""
        key = use, id(source)
        if key not in self._made:
            self._made[key] = insert_attribute(self._gm, next(self._names), make(), like=like, by="lowering")
        return self._made[key]


def _stored(weight: object) -> _Stored | None:
    """What a dequantize reads, when that is a constant matrix with scales for its rows or for groups in them."""
    if not isinstance(weight, Node) or weight.target not in (_PER_ROW, _PER_GROUP):
        return None
    bound = bind(weight)
    codes, scales, zeros = (constant(one) for one in weight.args[:3])
    if codes is None or scales is None or codes.dim() != 2 or codes.dtype is not torch.int8 or bound.get("axis", 0):
        return None
    scales = scales.detach().float().reshape(len(codes), -1)
    zeros = torch.zeros_like(scales) if zeros is None else zeros.detach().float().reshape(scales.shape)
    four = (bound["quant_min"], bound["quant_max"]) == (-8, 7) and codes.shape[1] % 2 == 0
    return _Stored(codes, scales, zeros, four)


# Linears --------------------------------------------------------------------------------------------------------------


def _linear(node: Node, made: _Constants) -> None:
    gemm = as_gemm(node)
    if gemm is None or is_dequantize(gemm.activation):
        return
    stored, value = _stored(gemm.weight), gemm.activation.meta.get("val")
    if stored is None or not isinstance(value, Tensor):
        return
    if value.dtype is torch.bfloat16 and value.dim() > 1 and (_fits_four(stored) or _fits_eight(stored)):
        node.replace_all_uses_with(_by_kernel(made, gemm, stored))
    else:
        node.replace_input_with(gemm.weight, _floats(gemm.weight, stored, made, value.dtype))


def _fits_four(stored: _Stored) -> bool:
    return stored.four and stored.group in _GROUPS


def _fits_eight(stored: _Stored) -> bool:
    per_row = stored.scales.shape[1] == 1 and not bool(stored.zeros.any())
    return per_row and stored.codes.shape[1] % _COLUMNS == 0


def _by_kernel(made: _Constants, gemm: Gemm, stored: _Stored) -> Node:
    """What a linear in bfloat16 returns, computed by a kernel from rows of its input."""
    node, value, outputs = gemm.node, gemm.activation.meta["val"], len(stored.codes)
    rows = gemm.activation if value.dim() == 2 else _emit(node, aten.flatten.using_ints, gemm.activation, 0, -2)
    product = (_by_four if _fits_four(stored) else _by_eight)(made, gemm, stored, rows)
    if value.dim() == 2:
        return product
    sizes = [_emit(node, aten.sym_size.int, gemm.activation, index) for index in range(value.dim() - 1)]
    return _emit(node, aten.reshape.default, product, [*sizes, outputs])


def _by_four(made: _Constants, gemm: Gemm, stored: _Stored, rows: Node) -> Node:
    outputs = len(stored.codes)

    def codes() -> Tensor:
        raised = _filled(stored.codes, outputs + -outputs % _ROWS).to(torch.int32) + 8
        return aten._convert_weight_to_int4pack_for_cpu(raised, 1)  # type: ignore[no-any-return]

    def qparams() -> Tensor:
        # The kernel computes (code + 8 - 8) * scale + zero, with groups in the first dimension.
        both = torch.stack((stored.scales, -stored.zeros * stored.scales), -1)
        whole = _filled(both.flatten(1), outputs + -outputs % _ROWS).unflatten(1, (-1, 2))
        return whole.transpose(0, 1).contiguous().to(torch.bfloat16)  # type: ignore[no-any-return]

    weight = made.get("codes for a kernel", gemm.weight, stored.codes, codes)
    scales = made.get("scales for a kernel", gemm.weight, stored.codes, qparams)
    product = _narrowed(gemm.node, _emit(gemm.node, _INT4, rows, weight, stored.group, scales), outputs)
    return product if gemm.bias is None else _emit(gemm.node, aten.add.Tensor, product, gemm.bias)


def _by_eight(made: _Constants, gemm: Gemm, stored: _Stored, rows: Node) -> Node:
    node, like, of, outputs = gemm.node, gemm.weight, stored.codes, len(stored.codes)
    length = max(outputs, _ROWS)
    exact = stored.scales.flatten()
    short = exact.to(torch.bfloat16)
    weight = made.get("codes for a kernel", like, of, lambda: _filled(of, length))
    scales = made.get("scales for a kernel", like, of, lambda: _filled(short.unsqueeze(1), length).flatten())
    product = _narrowed(node, _emit(node, _INT8, rows, weight, scales), outputs)
    # The kernel reads scales of bfloat16. Where those of all rows are alike, so is their rounding: up to 0.4 % of each
    # number, and of what the next layer makes of it.
    product = _emit(
        node,
        aten.mul.Tensor,
        product,
        made.get("lost", like, of, lambda: torch.where(short == 0, 1.0, exact / short.float())),
    )
    if gemm.bias is not None:
        product = _emit(node, aten.add.Tensor, product, gemm.bias)
    return _emit(node, aten.to.dtype, product, torch.bfloat16)


def _filled(rows: Tensor, length: int) -> Tensor:
    """With rows of zeros up to a length."""
    return torch.nn.functional.pad(rows, (0, 0, 0, length - len(rows)))


def _narrowed(node: Node, product: Node, outputs: int) -> Node:
    whole = product.meta["val"].shape[1] == outputs
    return product if whole else _emit(node, aten.slice.Tensor, product, 1, 0, outputs)


# Tables ---------------------------------------------------------------------------------------------------------------


def _embedding(node: Node, made: _Constants) -> None:
    table, indices = node.args[:2]
    stored = _stored(table)
    if stored is None or not isinstance(table, Node):
        return
    rows = _floats(table, stored, made, node.meta["val"].dtype, lambda one: _emit(node, node.target, one, indices))
    node.replace_all_uses_with(rows)


def _embedding_bag(node: Node, made: _Constants) -> None:
    """Sums and means of rows, by the kernel of torch for tables of 8 bits with one scale a row.

    A loop that dequantizes the rows before a sum of segments takes 3 to 4 times as long.
    """
    bound = bind(node)
    table, indices, offsets, last = (bound[key] for key in ("weight", "indices", "offsets", "include_last_offset"))
    stored, left_out = _stored(table), bound.get("padding_idx")
    if stored is None or not _can_be_bagged(node, stored, bound["mode"], left_out):
        return
    rows = made.get(f"bags without {left_out}", table, stored.codes, lambda: _rows_of_bytes(stored, left_out))
    dtype, weights = node.meta["val"][0].dtype, bound["per_sample_weights"]
    if weights is not None and dtype is not torch.float32:
        weights = _emit(node, aten.to.dtype, weights, torch.float32)
    value = _emit(node, _BAG, rows, indices, offsets, False, 0, False, weights, None, last)
    if bound["mode"] == _MEAN:
        value = _emit(node, aten.div.Tensor, value, _sizes_of_bags(node, indices, offsets, last))
    if dtype is not torch.float32:
        value = _emit(node, aten.to.dtype, value, dtype)
    for user in list(node.users):
        user.replace_all_uses_with(value)


def _can_be_bagged(node: Node, stored: _Stored, mode: int, left_out: int | None) -> bool:
    read = [user for user in node.users if user.users]  # export writes all four results, three of them for training
    first = all(user.target is operator.getitem and user.args[1] == 0 for user in read)
    if not first or stored.scales.shape[1] != 1:
        return False
    return mode == _SUM or (mode == _MEAN and left_out is None)


def _rows_of_bytes(stored: _Stored, left_out: int | None) -> Tensor:
    """The kernel's rows: codes as uint8, then scale and bias as float32; value = code * scale + bias."""
    raised = (stored.codes.to(torch.int16) + 128).to(torch.uint8)
    scales, biases = stored.scales.clone(), -(stored.zeros + 128.0) * stored.scales
    if left_out is not None:
        scales[left_out], biases[left_out] = 0.0, 0.0  # it adds nothing to a sum
    return torch.cat((raised, scales.view(torch.uint8), biases.view(torch.uint8)), dim=1)


def _sizes_of_bags(node: Node, indices: Any, offsets: Any, last: bool) -> Node:
    """How many rows each bag has, in a column; 1 for empty ones, whose sum is 0."""
    ends = _emit(node, aten.slice.Tensor, offsets, 0, 1)
    if last:
        starts = _emit(node, aten.slice.Tensor, offsets, 0, 0, -1)
    else:
        starts, end = offsets, _emit(node, aten.sym_size.int, indices, 0)
        ends = _emit(node, aten.cat.default, [ends, _emit(node, aten.new_full.default, offsets, [1], end)])
    counts = _emit(node, aten.clamp_min.default, _emit(node, aten.sub.Tensor, ends, starts), 1)
    return _emit(node, aten.unsqueeze.default, counts, 1)


_REWRITES: dict[Any, Callable[[Node, _Constants], None]] = {
    **dict.fromkeys(LINEAR, _linear),
    aten.embedding.default: _embedding,
    aten.embedding_bag.default: _embedding_bag,
    aten.embedding_bag.padding_idx: _embedding_bag,
}


# Real numbers ---------------------------------------------------------------------------------------------------------


def _floats(
    weight: Node, stored: _Stored, made: _Constants, dtype: torch.dtype, rows: Callable[[Node], Node] = lambda one: one
) -> Node:
    """(codes - zeros) * scales in the given dtype, of those rows that `rows` takes out of a matrix.

    Begins with a dequantize of scale 1: what depends on constants alone Inductor computes beforehand, but not that one.
    """
    storage, four, of = torch.uint8 if stored.four else torch.int8, stored.four, stored.codes
    bounds = torch.iinfo(storage)
    codes = made.get("bytes", weight, of, lambda: _two_in_a_byte(of)) if four else weight.args[0]
    value = _emit(weight, Q.dequantize_per_tensor.default, rows(codes), 1.0, 0, bounds.min, bounds.max, storage)  # type: ignore[arg-type]
    if four:
        high = _emit(weight, aten.floor.default, _emit(weight, aten.mul.Tensor, value, 1 / 16))
        low = _emit(weight, aten.sub.Tensor, value, _emit(weight, aten.mul.Tensor, high, 16.0))
        value = _emit(weight, aten.sub.Tensor, _emit(weight, aten.cat.default, [low, high], -1), 8.0)
    grouped = stored.scales.shape[1] > 1
    value = _emit(weight, aten.unflatten.int, value, -1, [-1, stored.group]) if grouped else value

    def of_groups(use: str, tensor: Tensor) -> Node:
        found = rows(made.get(use, weight, of, lambda: tensor))
        return _emit(weight, aten.unsqueeze.default, found, -1) if grouped else found

    if bool(stored.zeros.any()):
        value = _emit(weight, aten.sub.Tensor, value, of_groups("zeros", stored.zeros))
    value = _emit(weight, aten.mul.Tensor, value, of_groups("scales", stored.scales))
    value = _emit(weight, aten.flatten.using_ints, value, -2, -1) if grouped else value
    return value if dtype is torch.float32 else _emit(weight, aten.to.dtype, value, dtype)


def _two_in_a_byte(codes: Tensor) -> Tensor:
    """uint8 (rows, columns / 2): code + 8 of a row's first half in the low bits, of its second in the high ones."""
    low, high = (codes + 8).to(torch.uint8).chunk(2, dim=1)
    return low | (high << 4)


def _emit(like: Node, target: Any, *args: Any) -> Node:
    return emit(like, "lowering", target, *args)
