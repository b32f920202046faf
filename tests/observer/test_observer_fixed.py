"""Observers that look at no data: fixed qparams, and placeholders for run-time ones."""

from __future__ import annotations

import pytest
import torch

from pt2e_quant.errors import CalibrationError
from pt2e_quant.observer import FixedQParamsObserver, PlaceholderObserver


def test_fixed_qparams_are_those_given():
    observer = FixedQParamsObserver(scale=1 / 256, zero_point=-128, dtype=torch.int8)
    observer(torch.tensor([1e9, torch.nan]))
    scale, zero_point = observer.calculate_qparams()
    assert (scale.tolist(), zero_point.tolist()) == ([1 / 256], [-128])
    assert (scale.dtype, zero_point.dtype) == (torch.float32, torch.int64)
    assert (observer.quant_min, observer.quant_max, observer.qscheme) == (-128, 127, torch.per_tensor_affine)


def test_fixed_qparams_take_the_fields_of_their_spec():
    fields = {"dtype": torch.uint8, "scale": 0.0625, "zero_point": 7, "quant_min": 1, "quant_max": 15, "qscheme": None}
    observer = FixedQParamsObserver.with_args(**fields, is_dynamic=False)()
    assert (observer.quant_min, observer.quant_max) == (1, 15)
    assert repr(observer) == "FixedQParamsObserver(scale=0.0625, zero_point=7, dtype=torch.uint8)"


def test_a_placeholder_carries_its_configuration():
    observer = PlaceholderObserver(torch.int8, quant_min=-100, quant_max=99, eps=2**-12, is_dynamic=True)
    assert (observer.dtype, observer.quant_min, observer.quant_max) == (torch.int8, -100, 99)
    assert (observer.eps, observer.is_dynamic, observer.qscheme) == (2**-12, True, torch.per_tensor_affine)
    assert not observer.state_dict()


@pytest.mark.parametrize(
    ("arguments", "way_out"),
    [
        ({"dtype": torch.int8, "is_dynamic": True}, "at run time from choose_qparams"),
        ({"dtype": torch.float16}, "use an observer that keeps a range"),
    ],
)
def test_a_placeholder_has_no_qparams(arguments, way_out):
    observer = PlaceholderObserver(**arguments)
    observer.site = "input x"
    with pytest.raises(CalibrationError, match=f"input x: a PlaceholderObserver looks at no data.*{way_out}"):
        observer.calculate_qparams()


def test_compute_dtype_is_deprecated_and_means_dynamic():
    with pytest.warns(FutureWarning, match="pass is_dynamic=True"):
        assert PlaceholderObserver(compute_dtype=torch.quint8).is_dynamic
