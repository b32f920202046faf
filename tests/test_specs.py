"""Specs are values that check themselves."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx import Graph

from pt2e_quant.errors import QuantizationError, SpecError
from pt2e_quant.observer import MinMaxObserver
from pt2e_quant.specs import (
    DerivedQuantizationSpec,
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    SharedQuantizationSpec,
    integer_range,
    is_per_channel,
    is_symmetric,
)

NODE = Graph().placeholder("x")
PER_TENSOR, PER_CHANNEL = torch.per_tensor_affine, torch.per_channel_symmetric


def derived(dtype: torch.dtype, **fields: Any) -> DerivedQuantizationSpec:
    return DerivedQuantizationSpec([NODE], lambda observers: None, dtype, **fields)


def observed(dtype: torch.dtype, **fields: Any) -> QuantizationSpec:
    return QuantizationSpec(dtype, MinMaxObserver, **fields)


def fixed(dtype: torch.dtype, **fields: Any) -> FixedQParamsQuantizationSpec:
    return FixedQParamsQuantizationSpec(dtype, **{"scale": 0.5, "zero_point": 3, **fields})


EVERY_KIND = pytest.mark.parametrize("make", [observed, fixed, derived], ids=["observed", "fixed", "derived"])


# --- ranges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "whole"),
    [
        (torch.int8, (-128, 127)),
        (torch.uint8, (0, 255)),
        (torch.int16, (-32768, 32767)),
        (torch.uint16, (0, 65535)),
        (torch.int32, (-(2**31), 2**31 - 1)),
        (torch.int64, (-(2**63), 2**63 - 1)),
        (torch.qint8, (-128, 127)),
        (torch.quint8, (0, 255)),
        (torch.qint32, (-(2**31), 2**31 - 1)),
        (torch.quint4x2, (0, 15)),
        (torch.quint2x4, (0, 3)),
        (torch.int4, (-8, 7)),
        (torch.uint2, (0, 3)),
        (torch.float32, None),
        (torch.float8_e4m3fn, None),
        (torch.complex64, None),
        (torch.bool, None),
    ],
    ids=str,
)
def test_the_range_of_a_dtype(dtype, whole):
    assert integer_range(dtype) == whole


@EVERY_KIND
@given(low=st.integers(-300, 300), high=st.integers(-300, 300))
def test_bounds_are_legal_exactly_when_they_are_a_range_of_the_dtype(make, low, high):
    if make is fixed:
        make = lambda dtype, **f: fixed(dtype, zero_point=f["quant_min"], **f)  # noqa: E731
    if -128 <= low < high <= 127:
        assert (make(torch.int8, quant_min=low, quant_max=high).quant_min) == low
    else:
        with pytest.raises(SpecError):
            make(torch.int8, quant_min=low, quant_max=high)


@EVERY_KIND
@pytest.mark.parametrize(
    ("dtype", "fields", "message"),
    [
        (
            torch.int8,
            {"quant_min": 0, "quant_max": 255},
            r"\[0, 255\] is not a range of torch.int8, which holds \[-128, 127\]",
        ),
        (torch.int8, {"quant_min": 9, "quant_max": 9}, "quant_min=9 must be smaller than quant_max=9"),
        (torch.uint8, {"quant_min": -1}, r"\[-1, 255\] is not a range of torch.uint8"),
        (torch.int8, {"quant_max": 128}, r"\[-128, 128\] is not a range of torch.int8"),
        (torch.int4, {"quant_min": -9}, r"which holds \[-8, 7\]"),
        (torch.float16, {"quant_max": 7}, "torch.float16 is not an integer type"),
        ("int8", {}, "dtype must be a torch.dtype, got 'int8'"),
    ],
    ids=["wrong signedness", "empty", "min", "max", "sub-byte", "float", "no dtype"],
)
def test_an_illegal_range_says_what_is_legal(make, dtype, fields, message):
    with pytest.raises(SpecError, match=message):
        make(dtype, **fields)


@EVERY_KIND
def test_one_bound_may_be_left_to_the_dtype(make):
    assert make(torch.int8, quant_min=-127).quant_max is None


@EVERY_KIND
@pytest.mark.parametrize("field", ["quant_min", "dtype"])
def test_specs_are_frozen(make, field):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(make(torch.int8), field, 0)


# --- observed ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"observer_or_fake_quant_ctr": None}, "must make an observer when called, got None"),
        ({"qscheme": PER_CHANNEL}, "needs ch_axis"),
        ({"qscheme": PER_CHANNEL, "ch_axis": 0, "is_dynamic": True}, "a dynamic spec cannot be per channel"),
    ],
    ids=["no constructor", "no axis", "dynamic per channel"],
)
def test_contradictions_are_refused(fields, message):
    with pytest.raises(SpecError, match=message):
        QuantizationSpec(**{"dtype": torch.int8, "observer_or_fake_quant_ctr": MinMaxObserver, **fields})


def test_equal_specs_are_equal_and_hash_equal():
    first, second = (QuantizationSpec(torch.int8, MinMaxObserver.with_args(eps=0.5), -7, 7, PER_TENSOR) for _ in "ab")
    assert first == second
    assert hash(first) == hash(second)
    assert first != dataclasses.replace(first, quant_max=6)


def test_specs_of_different_observers_differ():
    first, second = (QuantizationSpec(torch.int8, MinMaxObserver.with_args(eps=eps)) for eps in (0.5, 0.25))
    assert first != second


# --- fixed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, -0.5, math.inf, math.nan])
def test_a_fixed_scale_is_positive_and_finite(scale):
    with pytest.raises(SpecError, match="scale must be finite and greater than 0"):
        fixed(torch.int8, scale=scale)


@pytest.mark.parametrize(("zero_point", "fields"), [(-129, {}), (128, {}), (6, {"quant_max": 5})])
def test_a_fixed_zero_point_lies_in_the_range(zero_point, fields):
    with pytest.raises(SpecError, match=f"zero_point {zero_point} lies outside"):
        fixed(torch.int8, zero_point=zero_point, **fields)


# --- derived, shared, annotation --------------------------------------------------------------------------------------


def test_a_derived_spec_names_what_it_derives_from():
    with pytest.raises(SpecError, match="derived_from is empty"):
        DerivedQuantizationSpec([], lambda observers: None, torch.int32)


def test_a_derived_spec_is_hashable_although_it_holds_a_list():
    spec = derived(torch.int32)
    assert len({spec, dataclasses.replace(spec)}) == 1


def test_shared_specs_are_equal_when_they_share_with_the_same_tensor():
    assert SharedQuantizationSpec((NODE, NODE)) == SharedQuantizationSpec((NODE, NODE)) != SharedQuantizationSpec(NODE)


def test_annotations_do_not_share_their_maps():
    first, second = QuantizationAnnotation(), QuantizationAnnotation()
    first.input_qspec_map[NODE] = observed(torch.int8)
    assert second.input_qspec_map == {}
    assert (second.output_qspec, second.allow_implicit_sharing, second._annotated, second.rule) == (
        None,
        True,
        False,
        None,
    )


@pytest.mark.parametrize(
    ("scheme", "symmetric", "per_channel"),
    [
        (torch.per_tensor_affine, False, False),
        (torch.per_tensor_symmetric, True, False),
        (torch.per_channel_affine, False, True),
        (torch.per_channel_symmetric, True, True),
        (torch.per_channel_affine_float_qparams, False, True),
        (None, False, False),
    ],
    ids=str,
)
def test_schemes(scheme, symmetric, per_channel):
    assert (is_symmetric(scheme), is_per_channel(scheme)) == (symmetric, per_channel)


def test_a_wrong_spec_is_a_value_error_and_one_of_ours():
    assert issubclass(SpecError, ValueError)
    assert issubclass(SpecError, QuantizationError)
