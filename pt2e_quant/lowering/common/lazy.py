"""Names of a package that are loaded when they are asked for: a backend's limits are read without its compiler."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

__all__ = ["lazily"]


def lazily(package: str, **modules: str) -> Callable[[str], Any]:
    """`__getattr__` of a package: `name="module"` says which of its modules has a name."""

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f".{modules[name]}", package), name)

    return load
