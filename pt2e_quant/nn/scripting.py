"""Quantized modules refuse torch.jit.script, which cannot compile QTensors and says so of some type annotation."""

from __future__ import annotations

from typing import NoReturn

from ..errors import QuantizedTensorError

__all__ = ["Unscripted"]


class Unscripted:
    """A module that torch.jit.script must not compile."""

    def __prepare_scriptable__(self) -> NoReturn:
        """torch.jit.script calls it on every module, before it compiles any.

        Raises:
            QuantizedTensorError: always.
        """
        raise QuantizedTensorError(
            f"torch.jit.script cannot compile {type(self).__name__}, as quantized tensors are Python. Use torch.export "
            "or torch.compile; a model with dynamic modules alone can be traced with torch.jit.trace"
        )
