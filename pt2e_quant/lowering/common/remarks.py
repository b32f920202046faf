"""What a lowering tells besides its program: remarks, and how to list them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Remark", "section"]


@dataclass(frozen=True)
class Remark:
    """Something worth knowing that did not stop the lowering; `node` is a node of the converted graph."""

    node: str
    text: str

    def __str__(self) -> str:
        return f"{self.node}: {self.text}"


def section(title: str, rows: Any) -> str:
    """A title and indented lines."""
    return "\n".join([f"{title}:", *(f"  {row}" for row in rows)])
