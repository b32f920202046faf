"""report.why names rule, observer, who shares it and at what cost; or every reason against, and the way out."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pt2e_quant import Report, convert_pt2e, explain, prepare_pt2e
from pt2e_quant.errors import CalibrationError, CaptureError, TargetingError
from pt2e_quant.observer import HistogramObserver, MinMaxObserver
from pt2e_quant.quantizer import QuantizationConfig
from pt2e_quant.reasons import WAYS_OUT
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.nets import MLP, ConvNet, export
from tests.pt2e.kit import ACT, PER_CHANNEL, STATIC, ByHand, Toy, annotate, the_call

aten = torch.ops.aten


class Stacked(nn.Module):
    """A quiet tensor and a loud one, which cat brings to one scale."""

    def forward(self, quiet: Tensor, loud: Tensor) -> Tensor:
        return torch.sin(torch.cat([quiet, loud], 1))


QUIET, LOUD = torch.tensor([[-1.0, 3.0]]), torch.tensor([[-8.0, 8.0]])
STEPS = 115 + 120  # of ACT


@pytest.fixture
def stacked() -> GraphModule:
    prepared = prepare_pt2e(export(Stacked(), QUIET, LOUD), Toy(STATIC))
    prepared(QUIET, LOUD)
    return prepared


# --- what is quantized ------------------------------------------------------------------------------------------------


def test_it_names_rule_spec_observer_and_those_who_share_it(stacked):
    lines = explain(stacked).why("cat").splitlines()
    assert lines[0].startswith("cat = aten.cat.default   [test_why.py:")
    assert lines[1:5] == [
        "  quantized by cat",
        "  quiet: int8 [-120, 115] per tensor, MinMaxObserver",
        "    activation_post_process_0 (MinMaxObserver)",
        "    shared by quiet -> cat, loud -> cat, cat",
    ]


def test_it_names_scale_zero_point_and_range_once_the_model_is_converted(stacked):
    """By hand: 16 / 235 a step, zero in the middle of [-120, 115] is -2 (from -2.5, to even)."""
    scale = 16 / STEPS
    text = explain(convert_pt2e(stacked)).why("cat")
    ends = f"range [{(-120 + 2) * scale:.4g}, {(115 + 2) * scale:.4g}]"
    assert f"activation_post_process_0 (MinMaxObserver), scale {scale:.6g}, zero point -2, {ends}" in text


def test_it_names_the_quantizer_where_that_has_no_rules():
    """A quantizer of another package: its annotations say what, not by which rule."""
    peer = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    model = export(MLP(), torch.randn(2, 10))
    quantizer = peer.X86InductorQuantizer().set_global(peer.get_default_x86_inductor_quantization_config())
    text = explain(prepare_pt2e(model, quantizer)).why("down")
    assert "quantized by X86InductorQuantizer" in text
    assert "per channel of dim 0, symmetric, PerChannelMinMaxObserver" in text


# --- what sharing costs -----------------------------------------------------------------------------------------------


def test_sharing_costs_the_logarithm_of_the_ratio_of_the_scales(stacked):
    """Alone, [-1, 3] has steps of 4 / 235; the group has 16 / 235: two bits."""
    text = explain(stacked, [(QUIET, LOUD)]).why("cat")
    assert "  quiet: int8" in text
    assert "own range [-1, 3], shared [-8.034, 7.966]: 2.0 bits lost" in text
    assert "own range [-8, 8], shared [-8.034, 7.966]: nothing lost" in text


def test_what_costs_a_bit_or_more_is_listed_in_the_report(stacked):
    text = explain(stacked, [(QUIET, LOUD)]).text()
    section = text.split("Tensors that lose a bit or more to sharing\n")[1].split("\n\n")[0]
    assert section == "  quiet: own range [-1, 3], shared [-8.034, 7.966]: 2.0 bits lost"


def test_what_was_measured_is_in_the_json_of_the_report(stacked):
    report = explain(stacked, [(QUIET, LOUD)])
    assert "2.0 bits lost" in Report.from_json(report.to_json()).why("cat")


def test_measuring_leaves_the_record_of_the_model_as_it_was(stacked):
    before = explain(stacked).to_json()
    measured = explain(stacked, [(QUIET, LOUD)]).to_json()
    assert explain(stacked).to_json() == before != measured


def test_all_batches_count_in_every_form_that_a_batch_may_have(stacked):
    report = explain(stacked, [(QUIET / 2, LOUD), {"quiet": QUIET, "loud": LOUD}, [-QUIET / 4, LOUD]])
    assert {(own.tensor, own.low, own.high) for own in report.groups[0].own} == {
        ("quiet", -1.0, 3.0),
        ("loud", -8.0, 8.0),
        ("cat", -8.0, 8.0),
    }


def test_a_symmetric_scheme_counts_both_sides_of_zero():
    """[-1, 3] alone is [-3, 3]: the ratio is 8 to 3."""
    spec = replace(ACT, qscheme=torch.per_tensor_symmetric, quant_min=-127, quant_max=127)
    prepared = prepare_pt2e(export(Stacked(), QUIET, LOUD), Toy(QuantizationConfig(spec, spec, PER_CHANNEL)))
    prepared(QUIET, LOUD)
    assert f"{math.log2(8 / 3):.1f} bits lost" in explain(prepared, [(QUIET, LOUD)]).why("cat")


def test_measuring_leaves_the_state_of_the_observers_alone():
    config = get_symmetric_quantization_config(is_per_channel=True)  # histograms, which count every batch
    x = torch.randn(2, 3, 16, 16)
    prepared = prepare_pt2e(export(ConvNet(), x), XNNPACKQuantizer(config))
    prepared(x)
    before = copy.deepcopy(prepared.state_dict())
    explain(prepared, [x, 9 * x])
    after = prepared.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_values_beyond_the_range_of_the_group_are_no_bits_lost_but_clipped(stacked):
    text = explain(stacked, [(QUIET, 2 * LOUD)]).why("cat")
    assert "own range [-16, 16], shared [-8.034, 7.966]: what lies outside is clipped" in text


def test_without_batches_nothing_can_be_measured(stacked):
    with pytest.raises(CalibrationError, match="there is no batch"):
        explain(stacked, [])


def test_a_converted_model_has_no_observers_to_measure_beside(stacked):
    with pytest.raises(CaptureError, match="measures on the prepared model"):
        explain(convert_pt2e(stacked), [(QUIET, LOUD)])


# --- an observer that another one stands in for -----------------------------------------------------------------------


def test_an_observer_that_was_asked_for_and_not_made_is_named():
    """The consumer wants the same integers by another observer: the producer's stays, and the report says so."""

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(torch.relu(x))

    def function(gm: GraphModule) -> None:
        relu, tanh = the_call(gm, aten.relu.default), the_call(gm, aten.tanh.default)
        annotate(relu, {}, ACT)
        annotate(tanh, {relu: replace(ACT, observer_or_fake_quant_ctr=HistogramObserver)})

    report = explain(prepare_pt2e(export(Net(), torch.randn(2, 3)), ByHand(function)))
    assert [group.observer_class for group in report.groups] == ["MinMaxObserver"]
    assert report.groups[0].dropped == ("relu -> tanh: int8 [-120, 115] per tensor, HistogramObserver",)
    assert "instead of the one that was asked for on relu -> tanh: int8 [-120, 115]" in report.why("tanh")
    assert "Observers that were asked for and not made" in report.text()


def test_equal_recipes_of_an_observer_are_the_same_observer():
    one, other = (replace(ACT, observer_or_fake_quant_ctr=MinMaxObserver.with_args(eps=2**-13)) for _ in range(2))
    assert one.observer_or_fake_quant_ctr is not other.observer_or_fake_quant_ctr

    def function(gm: GraphModule) -> None:
        cat = the_call(gm, aten.cat.default)
        annotate(cat, {}, one)
        annotate(the_call(gm, aten.sin.default), {cat: other})

    report = explain(prepare_pt2e(export(Stacked(), QUIET, LOUD), ByHand(function)))
    assert [group.dropped for group in report.groups] == [()]


# --- what is not quantized --------------------------------------------------------------------------------------------


def test_it_says_all_reasons_their_kind_and_the_way_out(stacked):
    assert explain(stacked).why("sin").splitlines()[1:] == [
        "  float: no rule for aten.sin.default",
        f"  unsupported_op: {WAYS_OUT['unsupported_op']}",
    ]


def test_a_batch_norm_that_was_folded_says_into_what():
    report = explain(prepare_pt2e(export(ConvNet(), torch.randn(1, 3, 16, 16)), Toy(STATIC)))
    for name in ("batch_norm", "bn1"):
        assert "folded into conv2d (module stem)" in report.why(name)


@pytest.mark.parametrize(
    "select",
    [
        lambda quantizer: quantizer.set_module_name("bn1", None),
        lambda quantizer: quantizer.set_node_name("batch_norm", None),
        lambda quantizer: quantizer.set_module_type(nn.BatchNorm2d, None),
    ],
    ids=["module name", "node", "module type"],
)
def test_selecting_a_batch_norm_that_was_folded_says_into_what(select):
    model = export(ConvNet(), torch.randn(1, 3, 16, 16))
    with pytest.raises(TargetingError, match=r"batch_norm was folded into conv2d \(module 'stem'\); select that"):
        prepare_pt2e(model, select(Toy(STATIC)))


# --- how the values spread --------------------------------------------------------------------------------------------


class Outlier(nn.Module):
    """One value of a hundred is far away from the others."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) + 0.5


SPREAD = torch.linspace(-1.0, 1.0, 99)


def spread_report(far: float) -> Report:
    def function(gm: GraphModule) -> None:
        add, relu = the_call(gm, aten.add.Tensor), the_call(gm, aten.relu.default)
        annotate(relu, dict.fromkeys(relu.all_input_nodes, ACT), ACT)
        annotate(add, {relu: ACT})

    x = torch.cat([SPREAD, torch.tensor([far])]).repeat(2, 1)
    prepared = prepare_pt2e(export(Outlier(), x), ByHand(function))
    prepared(x)
    return explain(prepared, [(x,)])


def test_tensors_whose_values_share_few_steps_are_listed_with_the_numbers():
    """By hand: median 0, half of the others within 25 * 2 / 98 = 0.51 of it; 235 steps over [-1, 46]."""
    text = spread_report(46.0).text()
    start = text.index("Tensors half of whose values lie within 4 steps of their median")
    assert (
        "  x: own range [-1, 46] in steps of 0.2; half of its values lie within 2.6 steps of their median"
        in text[start:]
    )
    assert "worst_ops" in text[start:]


def test_values_that_fill_their_range_are_not_listed_though_half_are_zeros_of_a_relu():
    assert "half of whose values" not in spread_report(1.0).text()
