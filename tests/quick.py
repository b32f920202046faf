"""Which cases of a table `make test` runs; `make test-all` runs them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

__all__ = ["quick"]


def quick(cases: Iterable[Any], choose: Callable[[int, Any], bool]) -> list[Any]:
    """The cases of a parametrization; those that `choose` does not take, by position and value, are slow.

    A case of several parameters is a tuple. At least one must be taken, so that no table drops out unseen.
    """
    found = list(cases)
    taken = [choose(position, case) for position, case in enumerate(found)]
    if not any(taken):
        raise ValueError("no case of this table is quick")
    values = [case if isinstance(case, tuple) else (case,) for case in found]
    return [
        pytest.param(*value, marks=() if one else pytest.mark.slow) for value, one in zip(values, taken, strict=True)
    ]
