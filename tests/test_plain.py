"""Dataclasses come back from plain values, or the message says which value is of the wrong kind."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch

from pt2e_quant.plain import PlainError, from_plain, parse_json, to_plain


@dataclass(frozen=True)
class Inner:
    low: float
    dtype: torch.dtype = torch.int8


@dataclass(frozen=True)
class Outer:
    name: str
    kind: Literal["fixed", "derived"]
    inner: Inner | None
    scale: float | list[float] | None = None
    ends: tuple[float, float] = (0.0, 1.0)
    names: tuple[str, ...] = ()
    by_position: dict[int, Inner] = field(default_factory=dict)
    on: bool = False


WHOLE = Outer("a", "fixed", Inner(1.5), [0.5, 2], (-1.0, 3.0), ("x", "y"), {4: Inner(0.25, torch.uint8)}, on=True)


def test_plain_values_are_what_json_holds():
    assert to_plain(WHOLE) == {
        "name": "a",
        "kind": "fixed",
        "inner": {"low": 1.5, "dtype": "int8"},
        "scale": [0.5, 2],
        "ends": [-1.0, 3.0],
        "names": ["x", "y"],
        "by_position": {4: {"low": 0.25, "dtype": "uint8"}},
        "on": True,
    }


@pytest.mark.parametrize("value", [WHOLE, Outer("b", "derived", None)])
def test_a_dataclass_comes_back_from_json(value):
    assert from_plain(Outer, parse_json(json.dumps(to_plain(value)))) == value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, "name is 3, not str"),
        ({"kind": "observed"}, "kind is 'observed', not one of"),
        ({"inner": []}, r"inner is \[\], not the fields of Inner"),
        ({"inner": {}}, "inner misses 'low'"),
        ({"inner": {"low": 1.0, "high": 2.0}}, "inner does not have 'high'"),
        ({"inner": {"low": True}}, r"inner\.low is True, not float"),
        ({"inner": {"low": 10**400}}, "not a number of 64 bits"),
        ({"inner": {"low": 1.0, "dtype": "nope"}}, r"inner\.dtype is 'nope', not the name of a torch\.dtype"),
        ({"inner": {"low": 1.0, "dtype": "nn"}}, r"inner\.dtype is 'nn', not the name of a torch\.dtype"),
        ({"scale": "0.5"}, r"scale is '0\.5', not float"),
        ({"ends": [1.0]}, r"ends is \[1\.0\], not a list of 2"),
        ({"names": ["x", None]}, r"names\[1\] is None, not str"),
        ({"names": "xy"}, "names is 'xy', not a list"),
        ({"by_position": {"-1": {"low": 1.0}}}, "by_position is '-1', not a whole number as key"),
        ({"by_position": {"1": {"low": "1"}}}, r"by_position\['1'\]\.low is '1', not float"),
        ({"on": 1}, "on is 1, not bool"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(change: dict[str, Any], message):
    with pytest.raises(PlainError, match=message):
        from_plain(Outer, {**to_plain(WHOLE), **change})


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, b"\xff\xfe\xfd", '"\\ud800"', "1" * 5000, None])
def test_what_is_no_json_is_typed(text):
    with pytest.raises(PlainError):
        parse_json(text)
