"""What the table of kernels holds: one way to compute a product; and which one a caller names."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..qtensor.quantizing import own_codes

if TYPE_CHECKING:
    from .products import Product

__all__ = ["NAMED", "Codes", "Dynamic", "Kernel", "Real"]

NAMED: ContextVar[str | None] = ContextVar("named_kernel", default=None)
"""The kernel that `using` names."""

Codes = Callable[[Tensor], Tensor]
"""From the operand's codes to those of the result."""

Real = Callable[[Tensor, float, int], Tensor]
"""From the operand's codes, their scale and their zero point to real numbers in float32."""

Dynamic = Callable[[Tensor, bool], Tensor]
"""From real numbers to real numbers; whether one of their 8 bits stays unused."""


def _nothing(_: Product) -> None:
    return None


@dataclass(frozen=True)
class Kernel:
    """One way to compute a product. It looks at a product once, and makes a function that runs for all calls like it.

    name:  what `using` and `explain` call it
    why:   the reason for its place in the table
    codes: makes what computes codes of the product's grid
    real:  makes what computes real numbers, whatever the grid of the operand
    lacks: why it cannot compute this product here, or None
    loses: why another is taken although it can, or None
    whole: it takes integers; others take codes as whole numbers of any type
    dynamic: makes what computes real numbers of real numbers, where the kernel quantizes those by itself
    """

    name: str
    why: str
    codes: Callable[[Product], Codes]
    real: Callable[[Product], Real]
    lacks: Callable[[Product], str | None]
    loses: Callable[[Product], str | None] = _nothing
    whole: bool = True
    dynamic: Callable[[Product], Dynamic] | None = None

    def for_dynamic(self, product: Product) -> Dynamic:
        """What computes real numbers of real numbers, each time with the scale that their own range asks for."""
        if self.dynamic is not None:
            return self.dynamic(product)
        run, whole = self.real(product), self.whole
        return lambda x, reduce_range: run(*own_codes(x, reduce_range=reduce_range, whole=whole))
