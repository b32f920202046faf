"""Fixed and derived specs, casts, and points on which a tensor is quantized again with other qparams."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.errors import AnnotationError, CoverageError, SpecError
from pt2e_quant.observer import MinMaxObserver, PlaceholderObserver
from pt2e_quant.quantizer import DerivedQuantizationSpec, FixedQParamsQuantizationSpec, QuantizationSpec
from tests.nets import export
from tests.pt2e.kit import (
    ACT,
    PER_CHANNEL,
    ByHand,
    affine_by_hand,
    annotate,
    calls,
    on_grid,
    quantizes,
    relative_error,
    symmetric_by_hand,
    the_call,
)

aten = torch.ops.aten
decomposed = torch.ops.quantized_decomposed

FLOAT32_SUM = 1e-5  # the same integers and scales on both sides, summed in another order


def converted(module: nn.Module, x: Tensor, function: Any, **kwargs: object) -> GraphModule:
    prepared = prepare_pt2e(export(module, x), ByHand(function))
    prepared(x)
    return convert_pt2e(prepared, **kwargs)


class Sigmoid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)


# --- fixed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "limits"),
    [
        (FixedQParamsQuantizationSpec(torch.uint8, 1 / 256, 0, 0, 255), (0, 255, torch.uint8)),
        (FixedQParamsQuantizationSpec(torch.int8, 1 / 64, -3), (-128, 127, torch.int8)),
        (FixedQParamsQuantizationSpec(torch.int16, 2**-12, 5, -1000, 2000), (-1000, 2000, torch.int16)),
    ],
    ids=["uint8", "int8 without bounds", "int16"],
)
def test_fixed_qparams_are_written_as_they_are(spec, limits):
    gm = converted(Sigmoid(), torch.randn(2, 3), lambda gm: annotate(the_call(gm, aten.sigmoid.default), {}, spec))
    (node,) = quantizes(gm)
    assert node.args[1:] == (spec.scale, spec.zero_point, *limits)


def test_fixed_qparams_need_no_data():
    spec = FixedQParamsQuantizationSpec(torch.int8, 1 / 64, -3)
    function = lambda gm: annotate(the_call(gm, aten.sigmoid.default), {}, spec)  # noqa: E731
    prepared = prepare_pt2e(export(Sigmoid(), torch.randn(2, 3)), ByHand(function))
    x = torch.randn(2, 3)
    expected = on_grid(torch.sigmoid(x), 1 / 64, -3, -128, 127)
    torch.testing.assert_close(convert_pt2e(prepared)(x), expected, rtol=0, atol=1e-7)  # one float32 rounding near 1


# --- derived ----------------------------------------------------------------------------------------------------------


def product_of_scales(observers: list[Any]) -> tuple[Tensor, Tensor]:
    (first, _), (second, _) = (observer.calculate_qparams() for observer in observers)
    return first * second, torch.zeros_like(second, dtype=torch.int64)


def quantize_bias(gm: GraphModule) -> None:
    """int8 input, int8 weight per channel, and an int32 bias with scale[input] * scale[weight]."""
    node = the_call(gm, aten.linear.default)
    x, w, b = node.args
    bias = DerivedQuantizationSpec(
        [(x, node), (w, node)], product_of_scales, torch.int32, -(2**31), 2**31 - 1, torch.per_channel_symmetric, 0
    )
    annotate(node, {x: ACT, w: PER_CHANNEL, b: bias}, ACT)


def test_a_derived_bias_is_int32_with_the_product_of_both_scales():
    torch.manual_seed(0)
    model, x = nn.Linear(6, 5), torch.randn(4, 6)
    gm = converted(model, x, quantize_bias)
    scale = affine_by_hand([x])[0] * symmetric_by_hand(model.weight).flatten()
    frozen = {value.dtype: value for name, value in gm.named_buffers() if "frozen" in name}
    # The quotient reaches 1e4, where float32 scales (2**-24 relative) move it by at most 1e-3: a tie is 1 step off
    assert (frozen[torch.int32] - torch.round(model.bias / scale)).abs().max() <= 1


def test_a_model_with_integer_bias_computes_what_the_integers_say():
    torch.manual_seed(0)
    model, x = nn.Linear(6, 5), torch.randn(4, 6)
    gm = converted(model, x, quantize_bias)
    scale, zero_point = affine_by_hand([x])
    steps = symmetric_by_hand(model.weight)
    bias = torch.round(model.bias / (scale * steps.flatten())) * scale * steps.flatten()
    y = on_grid(x, scale, zero_point) @ on_grid(model.weight, steps, 0, -119, 119).T + bias
    assert relative_error(gm(x), on_grid(y, *quantizes(gm)[-1].args[1:3])) < FLOAT32_SUM


def test_an_activation_may_derive_from_a_weight():
    """The weight's observer runs at convert only; the derived one must see that run."""

    def function(gm: GraphModule) -> None:
        node = the_call(gm, aten.linear.default)
        derived = DerivedQuantizationSpec(
            [(node.args[1], node)], double, torch.int8, -128, 127, torch.per_tensor_affine
        )
        annotate(node, {node.args[1]: per_tensor}, derived)

    def double(observers: list[Any]) -> tuple[Tensor, Tensor]:
        scale, zero_point = observers[0].calculate_qparams()
        return scale * 2, zero_point

    per_tensor = QuantizationSpec(torch.int8, MinMaxObserver, -127, 127, torch.per_tensor_symmetric)
    model = nn.Linear(6, 5)
    gm = converted(model, torch.randn(4, 6), function)
    assert quantizes(gm)[-1].args[1] == pytest.approx(2 * model.weight.abs().max().item() / 127, rel=1e-6)


def test_a_derived_spec_from_an_unquantized_tensor_is_refused():
    def function(gm: GraphModule) -> None:
        node = the_call(gm, aten.linear.default)
        x, w, b = node.args
        annotate(node, {w: PER_CHANNEL, b: DerivedQuantizationSpec([(x, node)], product_of_scales, torch.int32)})

    with pytest.raises(AnnotationError, match=r"bias -> linear are derived from .* -> linear, which is not quantized"):
        prepare_pt2e(export(nn.Linear(6, 5), torch.randn(4, 6)), ByHand(function))


def test_the_report_names_what_a_spec_is_derived_from():
    gm = converted(nn.Linear(6, 5), torch.randn(4, 6), quantize_bias)
    assert any("derived from" in group.spec and "-> linear" in group.spec for group in explain(gm).groups)


# --- casts ------------------------------------------------------------------------------------------------------------


def test_a_floating_point_spec_becomes_a_pair_of_casts():
    half = QuantizationSpec(torch.float16, PlaceholderObserver)
    model, x = nn.Linear(6, 5), torch.randn(4, 6)

    def function(gm: GraphModule) -> None:
        node = the_call(gm, aten.linear.default)
        annotate(node, {node.args[1]: half})

    gm = converted(model, x, function)
    there, back = calls(gm, decomposed.convert_element_type.no_fuse)
    assert (there.args[1], back.args[1]) == (torch.float16, torch.float32)
    expected = x @ model.weight.half().float().T + model.bias
    assert relative_error(gm(x), expected) < FLOAT32_SUM


def in_its_own_dtype(gm: GraphModule) -> None:
    node = the_call(gm, aten.linear.default)
    x, w, b = node.args
    annotate(node, {x: ACT, w: PER_CHANNEL, b: QuantizationSpec(torch.float32, PlaceholderObserver)}, ACT)


def test_a_spec_in_the_dtype_that_a_tensor_has_asks_for_nothing():
    gm = converted(nn.Linear(6, 5), torch.randn(4, 6), in_its_own_dtype)
    assert the_call(gm, aten.linear.default).args[2].op == "get_attr"


def test_specs_in_the_dtype_of_the_model_quantize_nothing():
    def function(gm: GraphModule) -> None:
        node = the_call(gm, aten.linear.default)
        annotate(node, dict.fromkeys(node.args, QuantizationSpec(torch.float32, PlaceholderObserver)))

    with pytest.raises(CoverageError, match="without a spec for integers"):
        prepare_pt2e(export(nn.Linear(6, 5), torch.randn(4, 6)), ByHand(function))


# --- one tensor, several qparams --------------------------------------------------------------------------------------

NARROW = dataclasses.replace(ACT, quant_min=-8, quant_max=7)


class Two(nn.Module):
    """One result, two readers."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(x)
        return torch.tanh(x) + torch.relu(x)


def requantize(gm: GraphModule) -> None:
    """The output in 8 bits; tanh reads it in 4 bits, relu as it is."""
    sigmoid, tanh, relu = (the_call(gm, op) for op in (aten.sigmoid.default, aten.tanh.default, aten.relu.default))
    annotate(sigmoid, {}, ACT)
    annotate(tanh, {sigmoid: NARROW})
    annotate(relu, {sigmoid: ACT})


def test_a_use_with_another_spec_quantizes_the_quantized_tensor_again():
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    gm = converted(Two(), x, requantize)
    wide = on_grid(torch.sigmoid(x), *quantizes(gm)[0].args[1:3])
    narrow = on_grid(wide, *quantizes(gm)[1].args[1:3], -8, 7)
    torch.testing.assert_close(gm(x), torch.tanh(narrow) + torch.relu(wide), rtol=1e-6, atol=1e-6)


def test_a_use_with_the_same_spec_is_not_quantized_again():
    gm = converted(Two(), torch.randn(4, 6), requantize)
    relu, sigmoid = (the_call(gm, op) for op in (aten.relu.default, aten.sigmoid.default))
    assert relu.args[0].args[0].args[0] is sigmoid
    assert len(quantizes(gm)) == 2


def test_uses_with_different_specs_and_a_float_output_are_quantized_apart():
    def function(gm: GraphModule) -> None:
        sigmoid, tanh, relu = (the_call(gm, op) for op in (aten.sigmoid.default, aten.tanh.default, aten.relu.default))
        annotate(tanh, {sigmoid: NARROW})
        annotate(relu, {sigmoid: ACT})

    gm = converted(Two(), torch.randn(4, 6), function)
    sigmoid = the_call(gm, aten.sigmoid.default)
    assert [node.args[0] for node in quantizes(gm)] == [sigmoid, sigmoid]


@pytest.mark.parametrize("implicit", [True, False])
def test_uses_with_equal_specs_share_unless_an_annotation_forbids_it(implicit):
    def function(gm: GraphModule) -> None:
        sigmoid, tanh, relu = (the_call(gm, op) for op in (aten.sigmoid.default, aten.tanh.default, aten.relu.default))
        annotate(tanh, {sigmoid: ACT}, allow_implicit_sharing=implicit)
        annotate(relu, {sigmoid: ACT}, allow_implicit_sharing=implicit)

    gm = converted(Two(), torch.randn(4, 6), function)
    assert len(quantizes(gm)) == (1 if implicit else 2)


def test_a_weight_quantized_twice_is_rounded_from_the_integers_that_came_first():
    """A parameter whose own output is annotated: every reader sees its grid, one of them a coarser one."""
    coarse = QuantizationSpec(torch.int8, MinMaxObserver, -4, 3, torch.per_tensor_affine)
    fine = QuantizationSpec(torch.int8, MinMaxObserver, -128, 127, torch.per_tensor_affine)

    def function(gm: GraphModule) -> None:
        node = the_call(gm, aten.linear.default)
        annotate(node.args[1], {}, fine)
        annotate(node, {node.args[1]: coarse})

    model, x = nn.Linear(6, 5, bias=False), torch.randn(4, 6)
    gm = converted(model, x, function)
    weight = model.weight.detach()
    weight = on_grid(weight, *affine_by_hand([weight], -128, 127), -128, 127)
    weight = on_grid(weight, *affine_by_hand([model.weight.detach()], -4, 3), -4, 3)
    assert relative_error(gm(x), x @ weight.T) < FLOAT32_SUM


# --- constructors -----------------------------------------------------------------------------------------------------


def spec_with(constructor: Any) -> Any:
    return lambda gm: annotate(
        the_call(gm, aten.sigmoid.default),
        {},
        QuantizationSpec(torch.int8, constructor, -128, 127, torch.per_tensor_affine),
    )


@pytest.mark.parametrize(
    ("constructor", "message"),
    [
        (lambda: MinMaxObserver(), "cannot be made from its spec"),
        (lambda **kwargs: 7, "must make an nn.Module, it made int"),
    ],
    ids=["wrong arguments", "no module"],
)
def test_a_constructor_that_does_not_fit_is_refused(constructor, message):
    with pytest.raises(SpecError, match=message):
        prepare_pt2e(export(Sigmoid(), torch.randn(2, 3)), ByHand(spec_with(constructor)))


def test_an_object_that_is_no_spec_is_refused():
    function = lambda gm: annotate(the_call(gm, aten.sigmoid.default), {}, "int8")  # noqa: E731
    with pytest.raises(AnnotationError, match="'int8' is not a quantization spec"):
        prepare_pt2e(export(Sigmoid(), torch.randn(2, 3)), ByHand(function))


class OwnFields:
    """A spec of some other package: no class of ours, the same fields."""

    dtype = torch.int8
    observer_or_fake_quant_ctr = MinMaxObserver
    quant_min, quant_max, qscheme, ch_axis, is_dynamic = -100, 90, torch.per_tensor_affine, None, False


def test_a_spec_is_known_by_its_fields():
    gm = converted(
        Sigmoid(), torch.randn(2, 3), lambda gm: annotate(the_call(gm, aten.sigmoid.default), {}, OwnFields())
    )
    assert quantizes(gm)[0].args[3:] == (-100, 90, torch.int8)


def test_a_node_reads_each_of_its_inputs_with_its_own_spec():
    class Add(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(x) + torch.tanh(x)

    def function(gm: GraphModule) -> None:
        node: Node = the_call(gm, aten.add.Tensor)
        annotate(node, {node.args[0]: ACT, node.args[1]: NARROW})

    gm = converted(Add(), torch.randn(2, 3), function)
    assert [dq.args[3:5] for dq in the_call(gm, aten.add.Tensor).args] == [(-120, 115), (-8, 7)]
