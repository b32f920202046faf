"""`Observer.with_args(...)`: a recipe for observers, to be called once per tensor; what specs and configs hold.

A recipe is a value: two recipes for the same class with the same arguments are equal and hash equal, so the specs that
hold them compare as the user expects. It pickles when its arguments do.

Before this: nothing. After it: `base` hangs the two class methods on every observer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

__all__ = ["PartialWrapper"]


class PartialWrapper:
    """A class with some of its constructor's arguments, callable as the class itself.

    Args:
        p: the class with its fixed arguments; `p.func` is the class, also after several `with_args`.
        callable_args: functions that are called to make an argument each time an object is made.
    """

    def __init__(self, p: partial[Any], callable_args: Mapping[str, Callable[[], Any]] | None = None) -> None:
        self.p = p
        self.callable_args: dict[str, Callable[[], Any]] = dict(callable_args or {})

    @property
    def __name__(self) -> str:
        return str(getattr(self.p.func, "__name__", self.p.func))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make the object. Arguments given here win over those of the recipe."""
        made = {name: make() for name, make in self.callable_args.items() if name not in kwargs}
        return self.p(*args, **{**made, **kwargs})

    def with_args(self, **kwargs: Any) -> PartialWrapper:
        """The same recipe with more, or other, fixed arguments."""
        still_called = {name: make for name, make in self.callable_args.items() if name not in kwargs}
        return PartialWrapper(partial(self.p, **kwargs), still_called)

    def with_callable_args(self, **kwargs: Callable[[], Any]) -> PartialWrapper:
        """The same recipe with arguments that are made anew, by a call, for each object."""
        return PartialWrapper(self.p, {**self.callable_args, **kwargs})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PartialWrapper):
            return NotImplemented
        return (
            self.p.func == other.p.func
            and _same(self.p.args, other.p.args)
            and _same(self.p.keywords, other.p.keywords)
            and _same(self.callable_args, other.callable_args)
        )

    def __hash__(self) -> int:
        # Values may be unhashable (lists, factory_kwargs); equal recipes have equal names, which is all a hash needs.
        return hash((self.p.func, frozenset(self.p.keywords), frozenset(self.callable_args)))

    def __repr__(self) -> str:
        fixed = [*map(repr, self.p.args), *(f"{name}={value!r}" for name, value in self.p.keywords.items())]
        called = [f"{name}={make!r}" for name, make in self.callable_args.items()]
        text = self.__name__ + (f".with_args({', '.join(fixed)})" if fixed or not called else "")
        return text + (f".with_callable_args({', '.join(called)})" if called else "")


def _same(one: Any, other: Any) -> bool:
    """`==`, where containers may hold tensors, whose own `==` is not a truth value."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    if type(one) is not type(other):
        return bool(one == other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[name]) for name, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
