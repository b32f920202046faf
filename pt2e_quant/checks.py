"""Arguments are checked at the door: what the annotations of a public function promise is what its body gets.

    @checked(SpecError)
    def __init__(self, bins: int = 2048, eps: float | None = None) -> None: ...

    MyObserver(bins=3.5)        SpecError: MyObserver: bins must be an int, got 3.5

Annotations are written once, for the reader, for mypy and for this. Kinds known here: classes, None, unions, Literal,
list, tuple, dict, other containers by their class alone, Callable, Any. A bool is no int; an int is a float; whole
numbers of other packages (numpy) count as int, their real numbers as float.

Before this: nothing. After it: every room with public functions.
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
import numbers
import reprlib
import types
from collections.abc import Callable
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import QuantizationError

__all__ = ["check_fields", "checked"]

_Function = TypeVar("_Function", bound=Callable[..., Any])
_NUMBERS = {int: numbers.Integral, float: numbers.Real}
_CLASSES: dict[Any, str] = {int: "an int", float: "a number", bool: "True or False", str: "a text", type(None): "None"}


def checked(error: type[QuantizationError], *, but: tuple[str, ...] = ()) -> Callable[[_Function], _Function]:
    """Decorate a public function or `__init__`: arguments of a kind that its annotations do not name raise `error`.

    Arguments whose names do not fit stay a TypeError of Python's.

    Args:
        error: what to raise.
        but: arguments that the function reads itself, since it takes their like of another package.
    """

    def decorate(function: _Function) -> _Function:
        signature = inspect.signature(function)
        packed = {p.name for p in signature.parameters.values() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        trusted = packed.union(but)

        @functools.wraps(function)
        def at_the_door(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            owner = type(args[0]).__name__ if function.__name__ == "__init__" else function.__name__
            kinds = _kinds(function)
            for name, value in given.items():
                if name in kinds and name not in trusted:
                    _check(owner, name, value, kinds[name], error)
            return function(*args, **kwargs)

        return at_the_door  # type: ignore[return-value]

    return decorate


def check_fields(record: Any, error: type[QuantizationError]) -> None:
    """The same for the fields of a dataclass, to be called in its `__post_init__`."""
    for name, kind in _kinds(type(record)).items():  # type: ignore[arg-type]  # a class is called too
        _check(type(record).__name__, name, getattr(record, name), kind, error)


@functools.cache
def _kinds(owner: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(owner)


def _check(owner: str, name: str, value: object, kind: Any, error: type[QuantizationError]) -> None:
    if not _is(value, kind):
        raise error(f"{owner}: {name} must be {_words(kind)}, got {reprlib.repr(value)}")


def _is(value: object, kind: Any) -> bool:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_is(value, one) for one in arguments)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in arguments)
    if origin is collections.abc.Callable or kind is Callable:
        return callable(value)
    if origin is tuple and arguments[-1] is not Ellipsis:
        return isinstance(value, tuple) and len(value) == len(arguments) and all(map(_is, value, arguments))
    if origin in (list, tuple):
        return isinstance(value, (list, tuple)) and all(_is(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is(k, arguments[0]) and _is(v, arguments[1]) for k, v in value.items())
    if kind in _NUMBERS:
        return isinstance(value, _NUMBERS[kind]) and not isinstance(value, bool)
    return isinstance(value, origin or kind)


def _words(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_words, arguments)))
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin is collections.abc.Callable or kind is Callable:
        return "something to call"
    if origin in (list, tuple) or origin is dict:
        return f"a {origin.__name__} of ({', '.join(_words(one) for one in arguments if one is not Ellipsis)})"
    whole = origin or kind
    return _CLASSES.get(whole, f"a {_name(whole)}")


def _name(kind: Any) -> str:
    """'torch.dtype', as users write it; without the package for what is not torch's."""
    return f"torch.{kind.__name__}" if kind.__module__ in ("torch", "torch._C") else str(kind.__name__)
