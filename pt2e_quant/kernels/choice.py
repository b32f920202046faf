"""Which kernel computes a product, in one table: the first that fits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import QuantizedTensorError
from ..qtensor.tensor import is_traced
from . import carried, exact, graph, int_mm, onednn, packed
from .kernel import NAMED, Kernel

if TYPE_CHECKING:
    from .products import Product

__all__ = ["TABLE", "choose"]

_ORDER = (graph.KERNEL, packed.KERNEL, carried.SMALL, onednn.KERNEL, int_mm.KERNEL, carried.KERNEL, exact.KERNEL)

TABLE: dict[str, Kernel] = {kernel.name: kernel for kernel in _ORDER}
"""The kernels, in the order in which they are asked."""


def choose(product: Product) -> Kernel:
    """The first kernel that fits, or the one that `using` names.

    Raises:
        QuantizedTensorError: the named one cannot compute this product.
    """
    if is_traced():
        return graph.KERNEL
    named = TABLE.get(NAMED.get() or "")
    if named is None:
        return next(one for one in TABLE.values() if one.lacks(product) is None and one.loses(product) is None)
    lacks = named.lacks(product)
    if lacks is not None:
        raise QuantizedTensorError(
            f"using({named.name!r}): this kernel cannot compute the product of codes of shape {tuple(product.shape)} "
            f"with a weight of {tuple(product.weight.quantized.shape)}: {lacks}. Name another, or none"
        )
    return named
