"""Compile a converted graph with Inductor for x86.

`lower_to_inductor` is loaded when it is asked for, so that the backend's limits can be read without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .lower import lower_to_inductor
    from .program import InductorProgram

__all__ = ["InductorProgram", "lower_to_inductor"]


def __getattr__(name: str) -> Any:
    if name == "lower_to_inductor":
        from .lower import lower_to_inductor

        return lower_to_inductor
    if name in __all__:
        from . import program

        return getattr(program, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
