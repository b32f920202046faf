"""What onnxruntime's integer kernels for processors take, each fact once: a reason why not, or None.

Functions of arguments, shapes and dtypes. The quantizer's rules ask them before quantizing, the passes and the account
when lowering. Read in the selectors of onnxruntime 1.32 and tried there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from ...ops import ADAPTIVE_AVG_POOL, ADD, CAT, LEAKY_RELU, LINEAR, MAX_POOL, MEAN, MUL
from ...reasons import because
from ...specs import uneven_groups

__all__ = [
    "DYNAMIC_PRODUCT",
    "EIGHT_BITS",
    "TRANSPOSED",
    "WITH_KERNELS",
    "adds_otherwise",
    "blocks",
    "ends_in_float",
    "is_whole_image",
    "mean_of_part",
    "not_8_bits",
    "not_float32",
    "run_time_grid",
    "weight",
]

EIGHT_BITS = 255
"""Steps between the bounds of all of 8 bits."""

TRANSPOSED = "onnxruntime has no integer kernel for transposed convolutions"

DYNAMIC_PRODUCT = "its qparams are computed at run time, for which onnxruntime has kernels of linear only"

_aten = torch.ops.aten

WITH_KERNELS = (
    *ADD, *MUL, *MEAN, *ADAPTIVE_AVG_POOL, *MAX_POOL, *CAT, *LEAKY_RELU, _aten.sigmoid.default,
    _aten.avg_pool1d.default, _aten.avg_pool2d.default,
)  # fmt: skip
"""What computes on integers, besides products."""

_SMALLEST_BLOCK = 16


def not_8_bits(dtype: torch.dtype | None) -> str | None:
    """Of a static activation."""
    if dtype in (torch.uint8, torch.int8):
        return None
    name = str(dtype).removeprefix("torch.")
    why = f"{name} activations: onnxruntime's integer kernels take torch.uint8 and torch.int8"
    return because("configuration", why)


def not_float32(dtype: torch.dtype) -> str | None:
    """Of the result of a product in the graph."""
    if dtype is torch.float32:
        return None
    name = str(dtype).removeprefix("torch.")
    return because("dtype", f"it computes in {name}, onnxruntime's integer kernels in float32 alone")


def weight(dtype: torch.dtype | None, symmetric: bool) -> str | None:
    """Of a product with integer inputs."""
    if dtype is torch.int8 and symmetric:
        return None
    return because("configuration", "onnxruntime's integer kernels take int8 weights with zero point 0")


def run_time_grid(quant_min: int, quant_max: int) -> str | None:
    """Of a linear's input whose qparams are chosen while running."""
    if quant_max - quant_min == EIGHT_BITS:
        return None
    why = f"its input has the range [{quant_min}, {quant_max}]; DynamicQuantizeLinear knows all of 8 bits only"
    return because("configuration", why)


def blocks(inputs: int, size: int) -> str | None:
    """Of the inputs of a linear whose weight has a scale for each `size` neighbours."""
    if size < _SMALLEST_BLOCK or size & (size - 1):
        why = f"groups of {size}: onnxruntime multiplies by blocks of {_SMALLEST_BLOCK}, 32, 64 and so on"
        return because("group_size", why)
    return uneven_groups(inputs, size, f"its {inputs} inputs")


def ends_in_float(node: Node, quantized: bool) -> str | None:
    """Of a product with a static input, and whether its output is quantized."""
    if quantized or node.target in LINEAR:
        return None
    why = "its output is not quantized, and onnxruntime's integer convolutions end in integers"
    return because("configuration", why)


def adds_otherwise(alpha: object) -> str | None:
    """Of a sum."""
    return None if alpha in (None, 1) else because("factor", f"alpha={alpha}; the kernel adds with 1")


def is_whole_image(dimensions: int, dims: Sequence[int] | None) -> bool:
    """Whether a mean over these dimensions leaves batch and channels alone."""
    return (
        dims is not None and dimensions in (3, 4, 5) and {dim % dimensions for dim in dims} == {*range(2, dimensions)}
    )


def mean_of_part(dimensions: int, dims: Sequence[int] | None, dtype: Any) -> str | None:
    """Of a mean."""
    if dtype is not None:
        return because("conversion", f"dtype={dtype}: it converts; leave it out")
    if is_whole_image(dimensions, dims):
        return None
    return because("average", "onnxruntime has an integer kernel for means over whole images only")
