"""Which kernel computes a product, in one table: the first that fits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..qtensor.tensor import is_traced
from . import carried, exact, graph, int_mm, onednn
from .kernel import NAMED, Kernel

if TYPE_CHECKING:
    from .products import Product

__all__ = ["TABLE", "choose"]

_ORDER = (graph.KERNEL, carried.SMALL, onednn.KERNEL, int_mm.KERNEL, carried.KERNEL, exact.KERNEL)

TABLE: dict[str, Kernel] = {kernel.name: kernel for kernel in _ORDER}
"""The kernels, in the order in which they are asked."""


def choose(product: Product) -> Kernel:
    """The first kernel that fits; the one that `using` names, where it does."""
    if is_traced():
        return graph.KERNEL
    named = TABLE.get(NAMED.get() or "")
    if named is not None:
        return named
    x, switches = product.x, (torch._C._get_mkldnn_enabled(), torch._C._get_float32_matmul_precision())
    codes = x.codes
    key = ("choice", codes.dtype, codes.device, codes.shape, x.scale, x.zero_point, product.out, *switches)
    return product.weight.once(key, lambda: _first_that_fits(product))  # type: ignore[no-any-return]


def _first_that_fits(product: Product) -> Kernel:
    return next(kernel for kernel in TABLE.values() if kernel.lacks(product) is None)
