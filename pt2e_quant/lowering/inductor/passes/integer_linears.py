"""A linear that multiplies float values by integers, with one of torch's kernels in bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from ....graph.write import Symbol, call
from ...common.gemm import Gemm, as_gemm
from ...common.stored import Stored, stored
from ..limits import GROUPS
from .stored import Forms, floats

__all__ = ["rewrite_linear"]

aten = torch.ops.aten

_ROWS = 16
"""The kernel for 4 bits takes outputs by 16. That for 8 bits needs more than 8: up to 8 scales are numbers in the code
that Inductor 2.13 writes, where a kernel cannot read them."""

_COLUMNS = 16
"""The kernel for 8 bits reads weights by 16: with other numbers of inputs it returns wrong ones, or crashes."""


def rewrite_linear(node: Node, forms: Forms) -> None:
    """By a kernel where there is one; by a product with the dequantized weight elsewhere."""
    gemm = as_gemm(node)
    if gemm is None or gemm.is_integer:
        return
    weight, value = stored(gemm.weight), gemm.activation.meta.get("val")
    if weight is None or not isinstance(value, Tensor):
        return
    if value.dtype is torch.bfloat16 and value.dim() > 1 and (_fits_four(weight) or _fits_eight(weight)):
        node.replace_all_uses_with(_by_kernel(forms, gemm, weight).node)
    else:
        node.replace_input_with(gemm.weight, floats(forms, weight, value.dtype).node)


def _fits_four(weight: Stored) -> bool:
    return weight.four and weight.group in GROUPS


def _fits_eight(weight: Stored) -> bool:
    per_row = weight.scales.shape[1] == 1 and not bool(weight.zeros.any())
    return per_row and weight.codes.shape[1] % _COLUMNS == 0


def _by_kernel(forms: Forms, gemm: Gemm, weight: Stored) -> Symbol:
    """What a linear in bfloat16 returns, computed from rows of its input."""
    x, outputs = forms.write(gemm.activation), len(weight.codes)
    bias = None if gemm.bias is None else forms.write(gemm.bias)
    dimensions = len(x.shape)
    rows = x if dimensions == 2 else x.flatten(0, -2)
    product = (_by_four if _fits_four(weight) else _by_eight)(forms, weight, rows, bias)
    if dimensions == 2:
        return product
    sizes = [call(aten.sym_size.int, x, index) for index in range(dimensions - 1)]
    return product.reshape([*sizes, outputs])  # type: ignore[no-any-return]


def _by_four(forms: Forms, weight: Stored, rows: Symbol, bias: Symbol | None) -> Symbol:
    outputs = len(weight.codes)
    length = outputs + -outputs % _ROWS

    def codes() -> Tensor:
        raised = _filled(weight.codes, length).to(torch.int32) + 8
        return aten._convert_weight_to_int4pack_for_cpu(raised, 1)  # type: ignore[no-any-return]

    def qparams() -> Tensor:
        # The kernel computes (code + 8 - 8) * scale + zero, with groups in the first dimension.
        both = torch.stack((weight.scales, -weight.zeros * weight.scales), -1)
        whole = _filled(both.flatten(1), length).unflatten(1, (-1, 2))
        return whole.transpose(0, 1).contiguous().to(torch.bfloat16)  # type: ignore[no-any-return]

    stored_codes, scales = forms.get("codes", weight, codes), forms.get("scales of a kernel", weight, qparams)
    product = call(aten._weight_int4pack_mm_for_cpu.default, rows, stored_codes, weight.group, scales)
    product = _narrowed(product, outputs)
    return product if bias is None else product + bias


def _by_eight(forms: Forms, weight: Stored, rows: Symbol, bias: Symbol | None) -> Symbol:
    outputs = len(weight.codes)
    length = max(outputs, _ROWS)
    exact = weight.scales.flatten()
    short = exact.to(torch.bfloat16)
    codes = forms.get("codes", weight, lambda: _filled(weight.codes, length))
    scales = forms.get("scales of a kernel", weight, lambda: _filled(short.unsqueeze(1), length).flatten())
    product = _narrowed(call(aten._weight_int8pack_mm.default, rows, codes, scales), outputs)
    # The kernel reads scales of bfloat16. Where those of all rows are alike, so is their rounding: up to 0.4 % of each
    # number, and of what the next layer makes of it.
    product = product * forms.get("lost", weight, lambda: torch.where(short == 0, 1.0, exact / short.float()))
    return (product if bias is None else product + bias).to(torch.bfloat16)  # type: ignore[no-any-return]


def _filled(rows: Tensor, length: int) -> Tensor:
    """With rows of zeros up to a length."""
    return torch.nn.functional.pad(rows, (0, 0, 0, length - len(rows)))


def _narrowed(product: Symbol, outputs: int) -> Symbol:
    return product if product.shape[1] == outputs else product.slice(1, 0, outputs)
