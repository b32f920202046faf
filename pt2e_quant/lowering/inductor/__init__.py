"""Compile a converted graph with Inductor for x86."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..common.lazy import lazily

if TYPE_CHECKING:
    from .lower import lower_to_inductor
    from .program import InductorProgram

__all__ = ["InductorProgram", "lower_to_inductor"]

__getattr__ = lazily(__name__, lower_to_inductor="lower", InductorProgram="program")
