"""Where a model enters and leaves integers: modules that do nothing in float, and that `convert` replaces."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["DeQuantStub", "QuantStub"]


class QuantStub(nn.Module):
    """Here real numbers become integers.

    Args:
        qconfig: observes the tensor; None for that of the parent.
    """

    def __init__(self, qconfig: Any = None) -> None:
        super().__init__()
        if qconfig is not None:
            self.qconfig = qconfig

    def forward(self, x: Tensor) -> Tensor:
        """x."""
        return x


class DeQuantStub(QuantStub):
    """Here integers become real numbers. Arguments: those of QuantStub."""
