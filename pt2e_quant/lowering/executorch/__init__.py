"""Lower a converted graph to an ExecuTorch program (.pte).

`lower_to_executorch` is loaded when it is asked for, so that the backend's limits can be read without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .lower import lower_to_executorch
    from .program import ExecutorchMethods, ExecutorchProgram

__all__ = ["ExecutorchMethods", "ExecutorchProgram", "lower_to_executorch"]


def __getattr__(name: str) -> Any:
    if name == "lower_to_executorch":
        from .lower import lower_to_executorch

        return lower_to_executorch
    if name in __all__:
        from . import program

        return getattr(program, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
