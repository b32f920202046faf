"""Lower a converted graph to an ExecuTorch program (.pte)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..common.lazy import lazily

if TYPE_CHECKING:
    from .lower import lower_to_executorch
    from .program import ExecutorchMethods, ExecutorchProgram

__all__ = ["ExecutorchMethods", "ExecutorchProgram", "lower_to_executorch"]

__getattr__ = lazily(__name__, lower_to_executorch="lower", ExecutorchMethods="program", ExecutorchProgram="program")
