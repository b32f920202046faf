"""Progress of long steps in a terminal; nothing is written where there is none, or without rich."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

__all__ = ["counted", "telling"]

T = TypeVar("T")


def counted(things: Iterable[T], what: str) -> Iterator[T]:
    """The same things, with a bar that tells how many there were, and of how many where that is known."""
    bars = _bars(spinner=False)
    if bars is None:
        yield from things
        return
    total = len(things) if hasattr(things, "__len__") else None  # type: ignore[arg-type]
    with bars:
        yield from bars.track(things, description=what, total=total)


@contextmanager
def telling(what: str) -> Iterator[None]:
    """Around a step that cannot be counted."""
    bars = _bars(spinner=True)
    if bars is None:
        yield
        return
    with bars:
        bars.add_task(what, total=None)
        yield


def _bars(spinner: bool) -> Any:
    if not sys.stderr.isatty():
        return None
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    except ImportError:
        return None
    middle = (SpinnerColumn(),) if spinner else (BarColumn(), MofNCompleteColumn())
    columns = (TextColumn("{task.description}"), *middle, TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
