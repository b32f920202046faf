"""Helpers of the reference beside its eager mode: the same classes under the same names, from our tables."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pt2e_quant.quantization
from pt2e_quant import QuantizationError
from pt2e_quant.eager import helpers
from pt2e_quant.nn import intrinsic, quantized

torch_ao = torch.ao.quantization


SUBCLASSES = {"NonDynamicallyQuantizableLinear"}  # of Linear: here a class stands for these


@pytest.mark.parametrize("form", ["static_quant", "dynamic_quant", "qat", "static_quant_reference"])
def test_every_class_that_the_reference_maps_is_mapped(form):
    theirs, ours = (getattr(of, f"get_default_{form}_module_mappings")() for of in (torch_ao, helpers))
    assert {kind.__name__ for kind in theirs} - {kind.__name__ for kind in ours} <= SUBCLASSES


TORCHSCRIPT = {
    "convert_jit",
    "fuse_conv_bn_jit",
    "prepare_jit",
    "quantize_jit",
    "script_qconfig",
    "script_qconfig_dict",
}
SPARSE = {f"get_default_{kind}_sparse_quant_module_mappings" for kind in ("dynamic", "static")}
INNER = {"MatchAllNode", "Pattern", "TorchAODType", "get_fuser_method_new"}  # of FX mode's machinery, and of torchao


def test_names_that_the_reference_has_beyond_its_list_are_there_but_for_these():
    dynamic = {name.replace("_jit", "_dynamic_jit") for name in ("convert_jit", "prepare_jit", "quantize_jit")}
    missing = set(torch_ao.__all__) - set(pt2e_quant.quantization.__all__)
    assert missing == TORCHSCRIPT | dynamic | SPARSE | INNER


def test_a_class_is_looked_up():
    assert helpers.get_static_quant_module_class(nn.Conv2d) is quantized.Conv2d
    assert helpers.get_static_quant_module_class(nn.Conv2d, {nn.Conv2d: nn.Linear}) is nn.Linear
    assert helpers.get_static_quant_module_class(nn.Linear, is_reference=True) is quantized.reference.Linear
    assert helpers.get_dynamic_quant_module_class(nn.LSTM) is quantized.dynamic.LSTM
    assert helpers.get_quantized_operator(nn.functional.hardswish) is quantized.functional.hardswish


def test_a_class_without_a_form_is_an_error():
    with pytest.raises(QuantizationError, match=r"MaxPool2d has no static form\. Did you mean"):
        helpers.get_static_quant_module_class(nn.MaxPool2d)


def test_lists_hold_what_mappings_do():
    assert nn.LSTM in helpers.get_default_qconfig_propagation_list()
    assert quantized.Linear in helpers.get_default_compare_output_module_list()
    assert helpers.QuantType.WEIGHT_ONLY == 3


@pytest.mark.parametrize("is_qat", [False, True])
def test_modules_are_fused_one_by_one(is_qat):
    conv, bn, relu = (one.train(is_qat) for one in (nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU()))
    made = helpers.fuse_conv_bn_relu(is_qat, conv, bn, relu)
    assert type(made) is (intrinsic.ConvBnReLU2d if is_qat else intrinsic.ConvReLU2d)
    fuse = helpers.get_fuser_method((nn.Conv2d, nn.BatchNorm2d))
    assert type(fuse(is_qat, conv, bn)) is (intrinsic.ConvBn2d if is_qat else nn.Conv2d)


def test_classes_that_do_not_fuse_have_no_fuser():
    with pytest.raises(QuantizationError, match="not known to fuse"):
        helpers.get_fuser_method((nn.ReLU, nn.Conv2d))
