"""What a public function gets is what its annotations say; anything else is an error that names it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy
import pytest
import torch
from torch import Tensor

from pt2e_quant.checks import check_fields, checked
from pt2e_quant.errors import CaptureError, SpecError
from pt2e_quant.fake_quantize import FakeQuantize, LearnableFakeQuantize
from pt2e_quant.observer import (
    AffineQuantizedMinMaxObserver,
    FixedQParamsObserver,
    HistogramObserver,
    LpNormObserver,
    MappingType,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MSEObserver,
    NoopObserver,
    PercentileObserver,
    PerChannelMinMaxObserver,
    PerGroupMinMaxObserver,
    PerTensor,
    PlaceholderObserver,
    RecordingObserver,
)
from pt2e_quant.qconfig import QConfig, get_default_qconfig
from pt2e_quant.qconfig_mapping import QConfigMapping, get_default_qconfig_mapping
from pt2e_quant.schemes import Scheme
from pt2e_quant.specs import FixedQParamsQuantizationSpec, QuantizationSpec, SharedQuantizationSpec


@checked(CaptureError)
def function(
    whole: int = 1,
    real: float | None = None,
    yes: bool = True,
    word: Literal["a", "b"] = "a",
    call: Callable[[int], int] | None = None,
    sizes: tuple[int, ...] = (),
    pair: tuple[int, str] = (1, ""),
    names: list[str] | None = None,
    table: dict[str, int] | None = None,
    several: Iterable[str] = (),
    dtype: torch.dtype = torch.int8,
    tensor: Tensor | None = None,
    anything: Any = None,
    *rest: int,
    **named: int,
) -> str:
    """What it does."""
    return "ran"


GOOD = [
    {"whole": numpy.int64(3)},
    {"whole": 2**80, "real": 3},
    {"real": numpy.float32(0.5)},
    {"word": "b", "call": len, "sizes": [1, 2], "pair": (2, "x"), "names": ("y",)},
    {"table": {"a": 1}, "several": iter("ab"), "dtype": torch.qint8, "tensor": torch.ones(1)},
    {"anything": object(), "other": "not checked: packed arguments belong to whoever takes them in the end"},
]
BAD = [
    ({"whole": 3.7}, "whole must be an int, got 3.7"),
    ({"whole": True}, "whole must be an int, got True"),
    ({"real": "x"}, "real must be a number or None, got 'x'"),
    ({"real": False}, "real must be a number or None"),
    ({"yes": 1}, "yes must be True or False, got 1"),
    ({"word": "c"}, "word must be one of 'a', 'b', got 'c'"),
    ({"call": 3}, "call must be something to call or None"),
    ({"sizes": (1, "2")}, r"sizes must be a tuple of \(an int\)"),
    ({"sizes": 3}, r"sizes must be a tuple of \(an int\), got 3"),
    ({"pair": (1, 2)}, r"pair must be a tuple of \(an int, a text\)"),
    ({"names": "xy"}, r"names must be a list of \(a text\) or None"),
    ({"table": {1: 1}}, r"table must be a dict of \(a text, an int\) or None"),
    ({"several": 3}, r"several must be an Iterable of \(a text\), got 3"),
    ({"dtype": "int8"}, r"dtype must be a torch\.dtype, got 'int8'"),
    ({"tensor": [1.0]}, r"tensor must be a torch\.Tensor or None"),
]


@pytest.mark.parametrize("arguments", GOOD)
def test_what_the_annotations_say_is_taken(arguments):
    assert function(**arguments) == "ran"


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_anything_else_is_named(arguments, message):
    with pytest.raises(CaptureError, match=f"^function: {message}"):
        function(**arguments)


def test_the_function_stays_what_it_was():
    assert (function.__name__, function.__doc__) == ("function", "What it does.")
    with pytest.raises(TypeError, match="multiple values"):
        function(1, whole=2)


def test_what_a_function_reads_itself_is_left_to_it():
    @checked(SpecError, but=("own",))
    def lenient(own: int, other: int) -> int:
        return other

    assert lenient("like an int", 3) == 3
    with pytest.raises(SpecError, match="other"):
        lenient(1, "3")


def test_fields_of_a_dataclass_are_checked_under_its_name():
    @dataclass
    class Record:
        size: int

        def __post_init__(self) -> None:
            check_fields(self, SpecError)

    assert Record(3).size == 3
    with pytest.raises(SpecError, match=r"^Record: size must be an int, got None"):
        Record(None)


# --- the doors --------------------------------------------------------------------------------------------------------

DOORS = {
    "eps": lambda wrong: MinMaxObserver(eps=wrong),
    "quant_max": lambda wrong: MinMaxObserver(quant_max=wrong),
    "reduce_range": lambda wrong: MSEObserver(reduce_range=wrong),
    "qscheme": lambda wrong: HistogramObserver(qscheme=wrong),
    "bins": lambda wrong: HistogramObserver(bins=wrong),
    "p": lambda wrong: LpNormObserver(p=wrong),
    "percentile": lambda wrong: PercentileObserver(percentile=wrong),
    "averaging_constant": lambda wrong: MovingAverageMinMaxObserver(averaging_constant=wrong),
    "ch_axis": lambda wrong: PerChannelMinMaxObserver(ch_axis=wrong),
    "group_size": lambda wrong: PerGroupMinMaxObserver(group_size=wrong),
    "scale_dtype": lambda wrong: PerGroupMinMaxObserver(scale_dtype=wrong),
    "scale": lambda wrong: FixedQParamsObserver(scale=wrong, zero_point=3),
    "zero_point": lambda wrong: FixedQParamsObserver(scale=0.5, zero_point=wrong),
    "placeholder": lambda wrong: PlaceholderObserver(dtype=wrong),
    "noop": lambda wrong: NoopObserver(dtype=wrong),
    "recording": lambda wrong: RecordingObserver(dtype=wrong),
    "mapping": lambda wrong: AffineQuantizedMinMaxObserver(wrong, torch.int8, PerTensor()),
    "target": lambda wrong: AffineQuantizedMinMaxObserver(MappingType.SYMMETRIC, wrong, PerTensor()),
    "blocks": lambda wrong: AffineQuantizedMinMaxObserver(MappingType.SYMMETRIC, torch.int8, wrong),
    "fake": lambda wrong: FakeQuantize(observer=wrong),
    "fake bound": lambda wrong: FakeQuantize(quant_min=wrong, quant_max=wrong),
    "learnable": lambda wrong: LearnableFakeQuantize(MinMaxObserver, scale=wrong),
    "factory": lambda wrong: MinMaxObserver(factory_kwargs=wrong),
    "device": lambda wrong: MSEObserver(factory_kwargs={"device": wrong, "dtype": wrong}),
    "qconfig": lambda wrong: QConfig(wrong, MinMaxObserver),
    "backend": lambda wrong: get_default_qconfig(wrong),
    "mapping of a backend": lambda wrong: get_default_qconfig_mapping("x86", wrong),
    "global": lambda wrong: QConfigMapping().set_global(wrong),
    "module name": lambda wrong: QConfigMapping().set_module_name(wrong, get_default_qconfig()),
    "regex": lambda wrong: QConfigMapping().set_module_name_regex(wrong, get_default_qconfig()),
    "dictionary": lambda wrong: QConfigMapping.from_dict({"object_type": [(wrong,)]}),
    "scheme": lambda wrong: Scheme(dtype=wrong),
    "axis": lambda wrong: Scheme(dtype="int8", granularity="axis", axis=wrong),
    "symmetric": lambda wrong: Scheme(dtype="int8", symmetric=wrong),
    "block": lambda wrong: Scheme(dtype="int8", granularity="block", timing="weight_only", block_size=(2, wrong)),
    "spec": lambda wrong: QuantizationSpec(wrong, MinMaxObserver),
    "constructor": lambda wrong: QuantizationSpec(torch.int8, wrong),
    "spec bound": lambda wrong: QuantizationSpec(torch.int8, MinMaxObserver, wrong, 100),
    "dynamic": lambda wrong: QuantizationSpec(torch.int8, MinMaxObserver, is_dynamic=wrong),
    "fixed": lambda wrong: FixedQParamsQuantizationSpec(torch.uint8, wrong, 3),
    "shared": lambda wrong: SharedQuantizationSpec(wrong),
}


@pytest.mark.parametrize("wrong", ["int8", 3.7, -1.5, float("nan"), [1, 2]], ids=str)
@pytest.mark.parametrize("door", DOORS)
def test_a_wrong_value_is_a_spec_error_wherever_it_is_given(door, wrong):
    legal = {
        "eps": [3.7], "p": [3.7], "scale": [3.7], "percentile": [3.7], "fixed": [3.7], "learnable": [3.7],
        "module name": ["int8"], "regex": ["int8"], "scheme": ["int8"],
    }  # fmt: skip
    if wrong in legal.get(door, ()):
        DOORS[door](wrong)
        return
    with pytest.raises(SpecError):
        DOORS[door](wrong)
