"""The nodes that prepare named are still there at convert."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ..errors import ConversionError

__all__ = ["check_present"]


def check_present(names: Iterable[str], nodes: Collection[str]) -> None:
    """Refuse a graph that has lost nodes by which prepare remembers it.

    Raises:
        ConversionError: some are gone; they are named.
    """
    gone = [name for name in dict.fromkeys(names) if name not in nodes]
    if gone:
        raise ConversionError(
            f"nodes that prepare_pt2e saw are gone: {', '.join(gone)}. Between prepare_pt2e and convert_pt2e a graph "
            "may lose dead nodes only; make other changes before or after both."
        )
