"""A prepared model is an ordinary module: copied, saved, calibrated by hand, converted more than once."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.errors import AnnotationError, CalibrationError
from pt2e_quant.fake_quantize import FakeQuantize
from pt2e_quant.observer import MinMaxObserver, PerChannelMinMaxObserver
from pt2e_quant.quantizer import DerivedQuantizationSpec, QuantizationSpec
from tests.nets import MLP, export
from tests.pt2e.kit import ACT, DYNAMIC, PER_CHANNEL, STATIC, ByHand, Nothing, Toy, annotate, calls, quantizes, the_call

aten = torch.ops.aten
SYMMETRIC = torch.per_tensor_symmetric


def prepared_mlp(x: Tensor) -> torch.fx.GraphModule:
    return prepare_pt2e(export(MLP(), x), Toy(STATIC))


def scales(gm: GraphModule) -> list[Any]:
    return [group.scale for group in explain(gm).groups]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 10)


# --- what prepare makes -----------------------------------------------------------------------------------------------


def test_a_prepared_model_computes_what_the_float_model_computes(x):
    model = MLP()
    prepared = prepare_pt2e(export(model, x), Toy(STATIC))
    torch.testing.assert_close(prepared(x), model(x), rtol=0, atol=0)


def test_observers_are_submodules_by_the_name_that_tools_look_for(x):
    names = [name for name, module in prepared_mlp(x).named_children() if isinstance(module, nn.Module)]
    assert [name for name in names if name.startswith("activation_post_process_")] == [
        f"activation_post_process_{number}" for number in range(5)
    ]


def test_observers_know_the_place_that_they_watch(x):
    sites = [module.site for name, module in prepared_mlp(x).named_children() if name.startswith("activation_post")]
    assert [site.split(" = ")[0] for site in sites] == [
        "node linear",
        "node linear_1",
        "input x",
        "node relu",
        "node linear_1",
    ]


def test_a_weight_is_observed_at_convert_and_not_in_every_batch(x):
    gm = prepared_mlp(x)
    watched = {node.args[0].op for node in gm.graph.nodes if node.op == "call_module" and "guards" not in node.name}
    assert watched == {"placeholder", "call_function"}


class Counting(PerChannelMinMaxObserver):
    """Remembers what it was called with; a class attribute, since convert works on copies."""

    seen: ClassVar[list[tuple[str, torch.Size]]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((self.site.partition(" =")[0], x.shape))
        return super().forward(x)


def test_the_observer_of_a_weight_runs_once_and_only_at_convert(x):
    Counting.seen.clear()
    weight = replace(STATIC.weight, observer_or_fake_quant_ctr=Counting)
    gm = prepare_pt2e(export(MLP(), x), Toy(replace(STATIC, weight=weight)))
    for _ in range(3):
        gm(x)
    assert Counting.seen == []
    convert_pt2e(gm)
    assert len(Counting.seen) == len({site for site, _ in Counting.seen}) == 2  # the two linears


def test_the_guard_of_the_input_shapes_reads_the_input_itself(x):
    def by_hand(gm: GraphModule) -> None:
        annotate(gm.graph.find_nodes(op="placeholder")[0], {}, ACT)

    gm = prepare_pt2e(export(MLP(), x), ByHand(by_hand))
    (guard,) = [node for node in gm.graph.nodes if "guards" in node.name]
    assert [node.op for node in guard.all_input_nodes] == ["placeholder"]
    assert [point.consumers for point in explain(gm).record.points] == [("linear",)]


class Computed(nn.Module):
    """A linear whose weight is computed from a parameter in two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.37, -1.0], [0.61, 0.2]]))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.weight * 3.0 + 0.25).abs())


def test_what_is_computed_from_a_fake_quantized_weight_is_observed_while_it_trains():
    """In [-1, 1] on a grid of 1: 0.37 becomes 0 and 0.61 becomes 1, so abs(3 w + 0.25) lies in [0.25, 3.25]."""
    coarse = QuantizationSpec(torch.int8, FakeQuantize.with_args(observer=MinMaxObserver), -1, 1, SYMMETRIC)

    def by_hand(gm: GraphModule) -> None:
        scaled, computed = the_call(gm, aten.mul.Tensor), the_call(gm, aten.abs.default)
        annotate(scaled, {scaled.args[0]: coarse})
        annotate(computed, {}, ACT)

    gm = prepare_pt2e(export(Computed(), torch.ones(1, 2)), ByHand(by_hand))
    gm(torch.ones(1, 2))
    computed = gm.get_submodule(explain(gm).record.points[-1].observer)
    assert (computed.min_val.item(), computed.max_val.item()) == (0.25, 3.25)


def test_preparing_is_deterministic(x):
    exported = export(MLP(), x)
    first, second = prepare_pt2e(exported, Toy(STATIC)), prepare_pt2e(exported, Toy(STATIC))
    shapes = [{key: value.shape for key, value in gm.state_dict().items()} for gm in (first, second)]
    assert shapes[0] == shapes[1]


def test_calibration_state_travels_through_a_state_dict(x):
    exported = export(MLP(), x)
    calibrated, fresh = prepare_pt2e(exported, Toy(STATIC)), prepare_pt2e(exported, Toy(STATIC))
    calibrated(x)
    stream = io.BytesIO()
    torch.save(calibrated.state_dict(), stream)
    stream.seek(0)
    fresh.load_state_dict(torch.load(stream), strict=True)
    assert scales(convert_pt2e(fresh)) == scales(convert_pt2e(calibrated))


def test_an_empty_annotation_is_prepared_when_the_caller_allows_it(x):
    model = MLP()
    prepared = prepare_pt2e(export(model, x), Nothing(), allow_empty=True)
    torch.testing.assert_close(convert_pt2e(prepared)(x), model(x), rtol=0, atol=0)


# --- copies and repeated conversion -----------------------------------------------------------------------------------


def test_a_copy_keeps_observers_record_and_output(x):
    prepared = prepared_mlp(x)
    prepared(x)
    other = copy.deepcopy(prepared)
    torch.testing.assert_close(other(x), prepared(x), rtol=0, atol=0)
    assert explain(other).text() == explain(prepared).text()
    torch.testing.assert_close(other.state_dict(), prepared.state_dict(), rtol=0, atol=0)


def test_calibrating_a_copy_leaves_the_original_as_it_was(x):
    prepared = prepared_mlp(x)
    prepared(x)
    expected = scales(convert_pt2e(prepared))
    copy.deepcopy(prepared)(x * 100)
    assert scales(convert_pt2e(prepared)) == expected


def test_a_copy_converts_to_the_same_model(x):
    prepared = prepared_mlp(x)
    prepared(x)
    other = convert_pt2e(copy.deepcopy(prepared))
    torch.testing.assert_close(other(x), convert_pt2e(prepared)(x), rtol=0, atol=0)


def test_a_copy_of_a_derived_observer_follows_the_copied_source(x):
    """The copy, calibrated with twice the data range, derives twice the scale."""

    def function(gm: GraphModule) -> None:
        node = the_call(gm, aten.relu.default)
        first = node.args[0]
        double = DerivedQuantizationSpec([first], lambda o: o[0].calculate_qparams(), torch.int8, -120, 115)
        annotate(first, {}, ACT)
        annotate(node, {}, double)

    prepared = prepare_pt2e(export(MLP(), x), ByHand(function))
    other = copy.deepcopy(prepared)
    prepared(x)
    other(x * 50)
    own, copied = (scales(convert_pt2e(gm)) for gm in (prepared, other))
    assert own[0] == own[1]
    assert copied[0] == copied[1] > own[0]


def test_converting_twice_gives_the_same_model(x):
    prepared = prepared_mlp(x)
    prepared(x)
    first, second = convert_pt2e(prepared), convert_pt2e(prepared)
    assert first.code == second.code
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)


def test_converting_leaves_the_prepared_model_calibrating(x):
    prepared = prepared_mlp(x)
    prepared(x)
    before = scales(convert_pt2e(prepared))
    prepared(x * 2)
    after = scales(convert_pt2e(prepared))
    assert after[-1] > before[-1]
    assert explain(prepared).record.stage == "prepared"


def test_a_converted_model_can_be_copied(x):
    prepared = prepared_mlp(x)
    prepared(x)
    converted = convert_pt2e(prepared)
    other = copy.deepcopy(converted)
    torch.testing.assert_close(other(x), converted(x), rtol=0, atol=0)
    assert explain(other).to_json() == explain(converted).to_json()


def test_a_converted_model_can_be_exported_saved_and_loaded(x):
    prepared = prepared_mlp(x)
    prepared(x)
    converted = convert_pt2e(prepared)
    stream = io.BytesIO()
    torch.export.save(torch.export.export(converted, (x,)), stream)
    stream.seek(0)
    loaded = torch.export.load(stream)
    torch.testing.assert_close(loaded.module()(x), converted(x), rtol=0, atol=0)
    assert {name: value.dtype for name, value in loaded.state_dict.items() if "frozen" in name} == {
        "_frozen_param0": torch.int8,
        "_frozen_param1": torch.int8,
    }


# --- the quantizer's last word ----------------------------------------------------------------------------------------


class Watching(Toy):
    """Keeps the table of observers that the callback is shown."""

    table: dict[Any, nn.Module]

    def prepare_obs_or_fq_callback(self, model: GraphModule, edge_or_node_to_obs_or_fq: dict[Any, nn.Module]) -> None:
        self.table = dict(edge_or_node_to_obs_or_fq)


def test_the_callback_sees_every_edge_and_node(x):
    quantizer = Watching(STATIC)
    prepare_pt2e(export(MLP(), x), quantizer)
    sites = [site.name if isinstance(site, Node) else (site[0].name, site[1].name) for site in quantizer.table]
    assert sites == [
        ("x", "linear"),
        ("up_weight", "linear"),
        "relu",
        ("relu", "linear_1"),
        ("down_weight", "linear_1"),
        "linear_1",
    ]


def test_the_callback_sees_shared_observers_as_one(x):
    quantizer = Watching(STATIC)
    prepare_pt2e(export(MLP(), x), quantizer)
    relu, edge = [observer for site, observer in quantizer.table.items() if "relu" in str(site)][-2:]
    assert relu is edge


class Replacing(Toy):
    """Puts one observer of its own in the place of all that watch activations."""

    def prepare_obs_or_fq_callback(self, model: GraphModule, edge_or_node_to_obs_or_fq: dict[Any, nn.Module]) -> None:
        own = MinMaxObserver(dtype=torch.int8, quant_min=-7, quant_max=7, qscheme=torch.per_tensor_affine)
        for site, observer in edge_or_node_to_obs_or_fq.items():
            if isinstance(observer, MinMaxObserver):
                edge_or_node_to_obs_or_fq[site] = own


def test_observers_that_the_callback_puts_in_are_used(x):
    prepared = prepare_pt2e(export(MLP(), x), Replacing(STATIC))
    prepared(x)
    assert {node.args[3:5] for node in quantizes(convert_pt2e(prepared))} == {(-7, 7)}


def test_groups_that_the_callback_joins_share_one_scale(x):
    prepared = prepare_pt2e(export(MLP(), x), Replacing(STATIC))
    prepared(x)
    assert len({node.args[1] for node in quantizes(convert_pt2e(prepared))}) == 1


class Splitting(Toy):
    """Gives the two ends of one tensor different observers."""

    def prepare_obs_or_fq_callback(self, model: GraphModule, edge_or_node_to_obs_or_fq: dict[Any, nn.Module]) -> None:
        site = next(site for site in edge_or_node_to_obs_or_fq if isinstance(site, Node))
        edge_or_node_to_obs_or_fq[site] = MinMaxObserver(dtype=torch.int8)


def test_a_callback_that_splits_a_sharing_group_is_refused(x):
    with pytest.raises(
        AnnotationError, match=r"different observers to tensors that share qparams: relu, relu -> linear_1"
    ):
        prepare_pt2e(export(MLP(), x), Splitting(STATIC))


# --- observers that write their own quantize and dequantize -----------------------------------------------------------


class Halving(nn.Module):
    """Watches nothing and replaces itself by a division and a multiplication."""

    dtype = torch.float32

    def __init__(self, **fields: Any) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x

    def convert(self, model: GraphModule, node: Node) -> None:
        with model.graph.inserting_before(node):
            half = model.graph.call_function(aten.div.Tensor, (node.args[0], 2.0))
            whole = model.graph.call_function(aten.mul.Tensor, (half, 2.0))
        node.replace_all_uses_with(whole)
        model.graph.erase_node(node)


def test_an_observer_with_its_own_convert_writes_its_own_ops(x):
    spec = QuantizationSpec(torch.int8, Halving, -128, 127, torch.per_tensor_affine)
    prepared = prepare_pt2e(export(MLP(), x), ByHand(lambda gm: annotate(the_call(gm, aten.relu.default), {}, spec)))
    converted = convert_pt2e(prepared)
    assert len(calls(converted, aten.div.Tensor, aten.mul.Tensor)) == 2
    torch.testing.assert_close(converted(x), prepared(x), rtol=0, atol=0)


# --- calibration that is missing --------------------------------------------------------------------------------------


def test_every_site_without_data_is_named(x):
    """Users' item 3: convert raises and lists every observer that never ran, with node, module and line."""
    with pytest.raises(CalibrationError) as caught:
        convert_pt2e(prepared_mlp(x))
    message = str(caught.value)
    assert "3 observers never saw data, so 3 tensors have no range" in message
    assert "input x" in message
    assert "node relu = aten.relu.default(linear)" in message
    assert "in module 'down' (Linear), nets.py:" in message
    assert "allow_uncalibrated=True" in message


def test_uncalibrated_tensors_stay_in_float_where_the_caller_allows_it(x):
    """Users' item 3: unless allow_uncalibrated=True."""
    model = MLP()
    converted = convert_pt2e(prepare_pt2e(export(model, x), Toy(STATIC)), allow_uncalibrated=True)
    assert quantizes(converted) == []
    assert [name for name, _ in converted.named_buffers() if "frozen" in name] == ["_frozen_param0", "_frozen_param1"]


def test_a_derived_bias_stays_in_float_with_its_uncalibrated_source(x):
    def function(gm: GraphModule) -> None:
        node = calls(gm, aten.linear.default)[0]
        source, weight, bias = node.args
        derived = DerivedQuantizationSpec([(source, node)], lambda o: o[0].calculate_qparams(), torch.int32)
        annotate(node, {source: ACT, weight: PER_CHANNEL, bias: derived})

    converted = convert_pt2e(prepare_pt2e(export(MLP(), x), ByHand(function)), allow_uncalibrated=True)
    assert [name for name, _ in converted.named_buffers() if "frozen" in name] == ["_frozen_param0"]
    assert "up.bias" in converted.state_dict()


def test_dynamic_models_convert_without_a_word_about_calibration(x):
    assert quantizes(convert_pt2e(prepare_pt2e(export(MLP(), x), Toy(DYNAMIC)))) != []
