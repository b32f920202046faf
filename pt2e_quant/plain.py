"""Dataclasses as the plain values of JSON, and back, checked against their annotations.

    to_plain(record)              dictionaries, lists, numbers, text
    from_plain(Record, plain)     the record again; PlainError says which value is of the wrong kind

Whatever comes back is what the annotations promise, so that nobody has to check it again. Kinds known here: str, int,
float, bool, None, Any, torch.dtype, Literal, unions, list, tuple, dict with str or int keys, dataclasses.

Before this: nothing. After it: reports and calibration files.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import reprlib
import types
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

__all__ = ["PlainError", "from_plain", "parse_json", "to_plain"]

_Kind = TypeVar("_Kind")
_LARGEST = 1 << 63  # larger integers turn up in no record, and cannot become a float


class PlainError(ValueError):
    """Plain values are not those of the wanted kind."""


def to_plain(value: Any) -> Any:
    """dataclasses.asdict without its deep copies, which take longer than the rest of a report."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value):
        return {name: to_plain(field) for name, field in vars(value).items()}
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def from_plain(kind: type[_Kind], value: object) -> _Kind:
    """The value of this kind that `to_plain` took apart.

    Raises:
        PlainError: it is none; the message starts with the path to the culprit.
    """
    return _read(kind, value, "")  # type: ignore[no-any-return]


def parse_json(text: str | bytes) -> Any:
    """What JSON text says.

    Raises:
        PlainError: it is none, is nested too deeply, or holds half of a surrogate pair, which no text can.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise PlainError(f"{type(error).__name__}: {error}") from error
    return value


def _read(kind: Any, value: Any, where: str) -> Any:
    if type(value) is kind is str or type(value) is kind is float:
        return value
    origin, arguments = _parts(kind)
    if origin in (Union, types.UnionType):
        return _read_union(arguments, value, where)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, where)
    if origin is tuple or origin is list:
        return origin(_read_items(arguments, value, where))
    if origin is dict:
        _expect(isinstance(value, dict), "a dictionary", value, where)
        return {_read_key(arguments[0], k, where): _read(arguments[1], v, f"{where}[{k!r}]") for k, v in value.items()}
    if origin is Literal:
        _expect(
            any(value == one and type(value) is type(one) for one in arguments), f"one of {arguments}", value, where
        )
        return value
    return _read_leaf(kind, value, where)


def _read_leaf(kind: Any, value: Any, where: str) -> Any:
    if kind is torch.dtype:
        dtype = getattr(torch, value, None) if isinstance(value, str) else None
        _expect(isinstance(dtype, torch.dtype), "the name of a torch.dtype", value, where)
        return dtype
    wanted = (int, float) if kind is float else (kind,)  # JSON knows one kind of number
    _expect(kind is Any or type(value) in wanted, "None" if kind is type(None) else kind.__name__, value, where)
    _expect(type(value) is not int or abs(value) < _LARGEST, "a number of 64 bits", value, where)
    return value


def _read_dataclass(kind: Any, value: Any, where: str) -> Any:
    _expect(isinstance(value, dict), f"the fields of {kind.__name__}", value, where)
    hints, required = _fields(kind)
    for problem, names in (("misses", required - set(value)), ("does not have", set(value) - set(hints))):
        if names:
            raise PlainError(f"{where or kind.__name__} {problem} {', '.join(map(repr, sorted(names)))}")
    return kind(
        **{name: _read(hints[name], item, f"{where}.{name}" if where else name) for name, item in value.items()}
    )


def _read_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    problem: PlainError | None = None
    for kind in kinds:
        try:
            return _read(kind, value, where)
        except PlainError as error:
            problem = problem or error
    raise PlainError(str(problem))


def _read_items(kinds: tuple[Any, ...], value: Any, where: str) -> list[Any]:
    _expect(isinstance(value, (list, tuple)), "a list", value, where)
    if len(kinds) == 1 or kinds[-1] is Ellipsis:
        if kinds[0] in (str, float) and set(map(type, value)) <= {kinds[0]}:
            return list(value)  # thousands of scales
        kinds = (kinds[0],) * len(value)
    _expect(len(kinds) == len(value), f"a list of {len(kinds)}", value, where)
    return [_read(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True))]


def _read_key(kind: Any, key: Any, where: str) -> Any:
    """JSON turns keys into text."""
    if kind is int and isinstance(key, str):
        _expect(key.isdecimal() and key.isascii() and len(key) < 10, "a whole number as key", key, where)
        return int(key)
    return _read(kind, key, f"{where}, key")


def _expect(fits: bool, wanted: str, value: object, where: str) -> None:
    if not fits:
        raise PlainError(f"{where or 'it'} is {reprlib.repr(value)}, not {wanted}")


@functools.cache
def _parts(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    return get_origin(kind), get_args(kind)


@functools.cache
def _fields(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """The kind of each field of a dataclass, and the names of those without a default."""
    required = frozenset(
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    )
    return get_type_hints(kind), required
