"""Records of where nodes come from: shared, not copied, while a compiler runs."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch.fx.traceback import NodeSource

__all__ = ["sharing_provenance"]

_shares: ContextVar[bool] = ContextVar("_shares", default=False)
_inside = 0
_counting = threading.Lock()


@contextmanager
def sharing_provenance() -> Iterator[None]:
    """Let this thread's nodes share the records of where they come from; nobody writes to them.

    torch.fx copies the whole history of a node for every node that each pass makes of it, and compilers run dozens. It
    has no option for that: `copy.deepcopy` asks the class. So the class has an answer of ours as long as any thread is
    inside of such a block, and threads outside get the copy that they always got.
    """
    token = _shares.set(True)
    _enter()
    try:
        yield
    finally:
        _leave()
        _shares.reset(token)


def _enter() -> None:
    global _inside
    with _counting:
        _inside += 1
        if _inside == 1:
            NodeSource.__deepcopy__ = _copied  # type: ignore[attr-defined]


def _leave() -> None:
    global _inside
    with _counting:
        _inside -= 1
        if _inside == 0:
            del NodeSource.__deepcopy__  # type: ignore[attr-defined]


def _copied(source: NodeSource, memo: dict[int, Any]) -> NodeSource:
    if _shares.get():
        return source
    made = object.__new__(type(source))
    memo[id(source)] = made
    vars(made).update(copy.deepcopy(vars(source), memo))
    return made
