"""What Inductor's integer kernels take, each fact once: a reason why not, or None.

Functions of operators, arguments, shapes and dtypes. The quantizers' rules ask them before quantizing, the contract and
the passes before compiling, the account where a kernel is missing. Read in torch 2.13 and measured; docs/x86.md lists
which of Inductor's patterns each of them stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Node

from ...arguments import bind, sees_padding_only
from ...ops import RELU, RELUS, dynamic_ceiling, op_name, pads_zeros
from ...reasons import because

__all__ = [
    "AFTER_CONV",
    "AFTER_LINEAR",
    "BAGS",
    "GROUPS",
    "LIMITS",
    "MEAN",
    "MOVES",
    "NO_TRANSPOSED",
    "WITHOUT_VNNI",
    "bounds",
    "computed",
    "half_weights",
    "moves",
    "not_8_bits",
    "not_zero_padding",
    "padding_only",
    "pooled",
    "signed_convolution",
    "summed",
    "taken_apart",
    "unbatched",
    "uneven_padding",
    "weight",
]

aten = torch.ops.aten

AFTER_CONV = (*RELUS, aten.hardswish.default, aten.silu.default)
"""One of these a convolution's kernel also computes."""

AFTER_LINEAR = (*RELU, aten.gelu.default)

MOVES = (
    aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.ravel.default,
    aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.permute.default, aten.transpose.int, aten.t.default, aten.numpy_T.default, aten.mT.default,
    aten.swapaxes.default, aten.swapdims.default, aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int,
    aten.moveaxis.intlist, aten.slice.Tensor, aten.narrow.default, aten.select.int, aten.channel_shuffle.default,
    aten.pixel_shuffle.default, aten.pixel_unshuffle.default,
)  # fmt: skip
"""What a loop of ours moves as integers; `moves` knows their twins and other overloads too."""

_MOVING = frozenset(op._schema.name.partition("::")[2] for op in MOVES)

GROUPS = (32, 64, 128, 256)
"""Neighbours in a row that share a scale, as torch's kernel for weights of 4 bits takes them."""

WITHOUT_VNNI = 127
"""Largest activation that processors without VNNI multiply rightly: they add two products in 16 bits."""

NO_TRANSPOSED = "Inductor mistakes its weight for that of an ordinary convolution and computes wrong numbers"

BAGS = {
    "max": "mode='max': torch's kernel for tables of integers adds rows up, it has no maximum",
    "mean": "mode='mean' with padding_idx={}: torch's kernel does not count what it leaves out",
    "groups": "weights in groups: torch's kernel for bags takes one scale for each row",
}
MEAN, _MAX = 1, 2
_SMALL, _SMALL_OUTER = 16, 32


# Numbers --------------------------------------------------------------------------------------------------------------


def moves(node: Node) -> bool:
    """True for an operator of MOVES."""
    return op_name(node) in _MOVING


def signed_convolution(dtype: torch.dtype) -> str | None:
    """Unsigned activations of convolutions and, in a static recipe, of linears; on processors."""
    if dtype is torch.uint8:
        return None
    why = f"{_name(dtype)} activations: Inductor's convolution fails on signed ones when it runs; use torch.uint8"
    return because("configuration", why)


def not_8_bits(dtype: torch.dtype) -> str | None:
    """Activations of 8 bits."""
    if dtype in (torch.uint8, torch.int8):
        return None
    why = f"{_name(dtype)} activations: Inductor's integer kernels take torch.uint8 and torch.int8"
    return because("configuration", why)


def weight(axis: int, zero_points: torch.Tensor | None, scales: torch.Tensor | None) -> list[str]:
    """Weights with a scale in float32 for each output channel and zero points of 0."""
    found = []
    if zero_points is not None and bool(zero_points.any()):
        found.append("a channel of the weight has a zero point other than 0, which Inductor ignores")
    if axis != 0:
        found.append(f"the weight has its channels on axis {axis}, Inductor reads axis 0")
    if scales is not None and scales.dtype is not torch.float32:
        found.append(f"the scales of the weight are {_name(scales.dtype)}; oneDNN reads float32")
    return found


def half_weights(dtype: torch.dtype) -> str | None:
    """Weights in float16 with inputs in float32."""
    if dtype is torch.float32:
        return None
    return because("dtype", f"the input is {_name(dtype)}; oneDNN takes float16 weights with float32 inputs only")


# Products -------------------------------------------------------------------------------------------------------------


def computed(name: str) -> str:
    """Weight and bias are constants."""
    why = f"{name} is computed at run time; Inductor packs constant weights and biases only"
    return because("computed_operand", why)


def unbatched(x: int, w: int) -> str | None:
    """With a batch dimension.

    Of the dimensions of input and weight.
    """
    if x == w or (w == 2 and x > 2):
        return None
    return because("shape", "the input has no batch dimension; Inductor's integer kernels need one")


def uneven_padding(padding: object, kernel: Sequence[int], dilation: Sequence[int]) -> str | None:
    """padding='same' where that is as much on both sides."""
    spans = [(size - 1) * step for size, step in zip(kernel, dilation, strict=True)] if padding == "same" else []
    why = "padding='same' pads unevenly here; oneDNN pads both sides alike"
    return because("padding", why) if any(s % 2 for s in spans) else None


def padding_only(sizes: Sequence[Any], kernel: Sequence[int], **steps: Any) -> str | None:
    """Windows that each see a part of the input.

    Of the spatial sizes of input and weight, and of stride, padding and dilation. Seen with torch 2.13, oneDNN 3.12.
    """
    why = "a window sees padding only: oneDNN's sums are wrong there, or it reads memory that is not its own"
    return because("padding", why) if sees_padding_only(sizes, kernel, **steps) else None


def taken_apart(rows: Any, inputs: int, outputs: int) -> str | None:
    """Of more than a few numbers: smaller products Inductor writes out, before any kernel can take them."""
    one_row = isinstance(rows, int) and rows == 1
    outer = isinstance(rows, int) and inputs == 1 and rows + outputs <= _SMALL_OUTER
    if (one_row and (outputs == 1 or max(inputs, outputs) <= _SMALL)) or outer:
        return f"{rows} x {inputs} times {inputs} x {outputs} is so small that Inductor computes it in a loop, in float"
    return None


# What comes after them ------------------------------------------------------------------------------------------------


def bounds(low: object, high: object) -> str | None:
    """A clamp after it between two numbers, the smaller one first."""
    if not all(isinstance(bound, (int, float)) for bound in (low, high)):
        return because("bounds", "it clamps at bounds that are computed; the kernel needs numbers")
    why = f"it clamps at {low} and {high}, the wrong way round for the kernel"
    return because("bounds", why) if low > high else None  # type: ignore[operator]


def summed(alpha: object, product: torch.Tensor | None, other: torch.Tensor | None, same: bool) -> str | None:
    """A sum after it, with alpha=1, of another tensor of the same shape and dtype.

    Of an add after a product: the factor, both operands, and whether the other one is the product itself.
    """
    if alpha not in (None, 1):
        return because("factor", f"alpha={alpha}; the kernel adds with 1")
    if same:
        return because("sum_in_float", "it adds the product to itself; the kernel needs another operand")
    if product is None or other is None:
        return None
    if other.dtype != product.dtype:
        return because("dtype", f"it adds {_name(other.dtype)} to {_name(product.dtype)}; the kernel converts nothing")
    why = "its operands have different shapes; the kernel does not broadcast"
    return None if other.shape == product.shape else because("shape", why)


def pooled(sizes: Sequence[Any], ceil_mode: bool) -> str | None:
    """With a batch dimension; ceil_mode with fixed shapes only."""
    if len(sizes) != 4:
        return because("shape", "the input has no batch dimension; Inductor's integer max pooling needs one")
    return dynamic_ceiling(sizes, ceil_mode)


def not_zero_padding(node: Node) -> str | None:
    """Zeros only."""
    given = bind(node)
    words = f"mode={given.get('mode', 'constant')!r}, value={given['value']}"
    return None if pads_zeros(node) else because("padding", f"{words}: only zeros are padded in integers")


# Tables ---------------------------------------------------------------------------------------------------------------


def bags(mode: int, left_out: int | None, grouped: bool) -> str | None:
    """Sums of rows of 8 bits with a scale each; means too, where none is left out by padding_idx."""
    if mode == _MAX:
        return because("unsupported_op", BAGS["max"])
    if mode == MEAN and left_out is not None:
        return because("bag_mode", BAGS["mean"].format(left_out))
    return because("configuration", BAGS["groups"]) if grouped else None


LIMITS: MappingProxyType[str, tuple[Callable[..., object], ...]] = MappingProxyType({
    "convolution": (
        computed, unbatched, not_8_bits, signed_convolution, weight, uneven_padding, padding_only, bounds, summed,
    ),
    "linear": (computed, unbatched, not_8_bits, signed_convolution, weight, half_weights, summed, taken_apart),
    "max_pool2d": (pooled,),
    "pad": (not_zero_padding,),
    "embedding_bag": (bags,),
})  # fmt: skip
"""What each kernel, or loop of ours, does not take; the first line of a limit says what it does take."""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
