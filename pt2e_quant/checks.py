"""Arguments are checked at the door: what the annotations of a public function promise is what its body gets.

    @checked(SpecError)
    def __init__(self, bins: int = 2048, eps: float | None = None) -> None: ...

    MyObserver(bins=3.5)        SpecError: MyObserver: bins must be an int, got 3.5

Annotations are written once, for the reader, for mypy and for this. Kinds known here: classes, protocols that can be
asked at run time, None, unions, Literal, Callable, Any; list, tuple, dict and other containers with what they hold (an
iterator is not run for that). A bool is no int; an int is a float; whole numbers of other packages (numpy) count as
int, their real numbers as float.

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

import torch
from torch import Tensor

from .errors import QuantizationError

__all__ = ["check_fields", "checked"]

_Function = TypeVar("_Function", bound=Callable[..., Any])
_UNTYPED = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_NUMBERS = {int: (numbers.Integral, torch.SymInt), float: (numbers.Real, torch.SymInt, torch.SymFloat)}
_CLASSES: dict[Any, str] = {int: "an int", float: "a number", bool: "True or False", str: "a text", type(None): "None"}


def checked(
    error: type[QuantizationError], *, but: tuple[str, ...] = (), whole: bool = False
) -> Callable[[_Function], _Function]:
    """Decorate a public function or `__init__`: arguments of a kind that its annotations do not name raise `error`.

    Arguments whose names do not fit stay a TypeError of Python's.

    Args:
        error: what to raise.
        but: arguments that the function reads itself, since it takes their like of another package.
        whole: what torch refuses in the body is `error`, too, in torch's words: for functions and modules that hand
            their arguments on to torch.
    """

    def decorate(function: _Function) -> _Function:
        signature, untyped = inspect.signature(function), _UNTYPED if whole else ()
        parameters = signature.parameters.values()
        packed = {p.name for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        trusted = packed.union(but, ("self", "cls"))
        positions = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]

        @functools.cache
        def asked() -> dict[str, tuple[frozenset[Any], Any]]:
            kinds = ((name, kind) for name, kind in _kinds(function).items() if name not in trusted and kind is not Any)
            return {name: (_classes(kind), kind) for name, kind in kinds}

        def owner(args: Any) -> str:
            return type(args[0]).__name__ if function.__name__ == "__init__" else function.__name__

        @functools.wraps(function)
        def at_the_door(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_dynamo_compiling():  # which cannot read annotations, and sees no user's mistakes
                return function(*args, **kwargs)
            kinds = asked()
            for name, value in (*zip(positions, args, strict=False), *kwargs.items()):
                if name in kinds and type(value) not in kinds[name][0]:
                    _check(owner(args), name, value, kinds[name][1], error)
            try:
                return function(*args, **kwargs)
            except QuantizationError:
                raise
            except untyped as refusal:
                signature.bind(*args, **kwargs)  # names that do not fit
                raise error(f"{owner(args)}: {refusal}") from refusal

        return at_the_door  # type: ignore[return-value]

    return decorate


def check_fields(record: Any, error: type[QuantizationError]) -> None:
    """The same for the fields of a dataclass, to be called in its `__post_init__`."""
    for name, kind in _kinds(type(record)).items():  # type: ignore[arg-type]  # a class is called too
        _check(type(record).__name__, name, getattr(record, name), kind, error)


@functools.cache
def _kinds(owner: Callable[..., Any]) -> dict[str, Any]:
    """By argument or field. What a function returns is not looked at: its class may be that of an optional package."""
    if isinstance(owner, type):
        return get_type_hints(owner)
    taken = {name: kind for name, kind in owner.__annotations__.items() if name != "return"}
    return get_type_hints(types.SimpleNamespace(__annotations__=taken), owner.__globals__)


def _check(owner: str, name: str, value: object, kind: Any, error: type[QuantizationError]) -> None:
    if not _is(value, kind):
        raise error(f"{owner}: {name} must be {_words(kind)}, got {reprlib.repr(value)}")


def _classes(kind: Any) -> frozenset[Any]:
    """Classes whose own objects are of this kind without a closer look: asked first, as most arguments are those."""
    if get_origin(kind) in (Union, types.UnionType):
        return frozenset().union(*map(_classes, get_args(kind)))
    if get_origin(kind) is None and isinstance(kind, type):
        return frozenset((float, int) if kind is float else (kind,))
    return frozenset()


def _is(value: object, kind: Any) -> bool:
    if kind is Any:
        return True
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is None and isinstance(kind, type) and kind not in _NUMBERS:
        return isinstance(value, kind)
    if origin in (Union, types.UnionType):
        return any(_is(value, one) for one in arguments)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in arguments)
    if origin is collections.abc.Callable or kind is Callable:
        return callable(value)
    if kind in _NUMBERS:
        return isinstance(value, _NUMBERS[kind]) and not isinstance(value, bool)
    if origin is type:
        return isinstance(value, type)
    return _holds(value, origin, arguments)


def _holds(value: object, origin: Any, arguments: tuple[Any, ...]) -> bool:
    """Whether a container is of this class, and what it holds of these kinds, as far as that can be seen twice."""
    if origin is tuple and arguments[-1] is not Ellipsis:
        return isinstance(value, tuple) and len(value) == len(arguments) and all(map(_is, value, arguments))
    if not isinstance(value, (list, tuple) if origin in (list, tuple) else origin):
        return False
    if isinstance(value, collections.abc.Mapping) and len(arguments) == 2:
        return all(_is(k, arguments[0]) and _is(v, arguments[1]) for k, v in value.items())
    if arguments[0] is Any:
        return True
    if isinstance(value, Tensor):  # it holds tensors, of which one without dimensions holds none
        return arguments[0] is Tensor and value.dim() > 0
    return not isinstance(value, collections.abc.Collection) or all(_is(item, arguments[0]) for item in value)


def _words(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_words, arguments)))
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin is collections.abc.Callable or kind is Callable:
        return "something to call"
    if origin is type:
        return "a class"
    if origin is not None and any(one is not Any for one in arguments):
        held = ", ".join(_words(one) for one in arguments if one is not Ellipsis)
        return f"{_with_article(origin.__name__)} of ({held})"
    whole = origin or kind
    return _CLASSES.get(whole) or _with_article(_name(whole))


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIO' else 'a'} {name}"


def _name(kind: Any) -> str:
    """'torch.dtype', as users write it; without the package for what is not torch's."""
    return f"torch.{kind.__name__}" if kind.__module__ in ("torch", "torch._C") else str(kind.__name__)
