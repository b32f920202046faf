"""What the table of kernels holds: one way to compute a product; and which one a caller names."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .products import Product

__all__ = ["NAMED", "Kernel"]

NAMED: ContextVar[str | None] = ContextVar("named_kernel", default=None)
"""The kernel that `using` names."""


@dataclass(frozen=True)
class Kernel:
    """One way to compute a product.

    name:   what `using` and `explain` call it
    why:    the reason for its place in the table
    codes:  to codes of the product's grid
    real:   to real numbers
    lacks:  why it cannot compute this product here, or None
    """

    name: str
    why: str
    codes: Callable[[Product], Tensor]
    real: Callable[[Product], Tensor]
    lacks: Callable[[Product], str | None]
