"""FX mode after calibration: what torch.ao's FX mode computes and keeps, ours does; and what stays float says why."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping as torch_mapping
from torch.ao.quantization import quantize_fx as torch_fx
from torch.nn import functional as F

from pt2e_quant.errors import CalibrationError, CaptureError, ConversionError, CoverageError, TargetingError
from pt2e_quant.pt2e import record_of
from pt2e_quant.qconfig import default_dynamic_qconfig, default_qconfig
from pt2e_quant.qconfig_mapping import QConfigMapping, get_default_qconfig_mapping
from pt2e_quant.qtensor import QTensor
from pt2e_quant.quantize_fx import convert_fx, convert_to_reference_fx, fuse_fx, prepare_fx
from tests.fx.nets import Dense, Inception, InvertedResidual, Residual, made
from tests.nets import sqnr

MAPPING = get_default_qconfig_mapping("x86")


def batches(count=3, *shape):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(*(shape or (4, 3, 32, 32)), generator=generator) for _ in range(count)]


def calibrated(model, data, mapping=MAPPING, **options):
    prepared = prepare_fx(model, mapping, (data[0],), **options)
    for batch in data:
        prepared(batch)
    return prepared


class Both:
    """One net through both: x is fresh data, `wanted` what the float net computes on it."""

    def __init__(self, kind):
        self.model, data = made(kind), batches()
        self.prepared = calibrated(self.model, data)
        self.converted = convert_fx(self.prepared)
        torch.backends.quantized.engine = "x86"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = torch_fx.prepare_fx(copy.deepcopy(self.model), torch_mapping("x86"), (data[0],))
            for batch in data:
                theirs(batch)
            self.theirs_reference = torch_fx.convert_to_reference_fx(copy.deepcopy(theirs))
            self.theirs = torch_fx.convert_fx(theirs)
        self.x = batches(1, 8, 3, 32, 32)[0]
        self.wanted = self.model(self.x)


BOTH = functools.cache(Both)


@pytest.fixture(scope="module")
def residual():
    return BOTH(Residual)


@pytest.mark.parametrize("kind", [Residual, InvertedResidual, Dense, Inception])
def test_accuracy_is_that_of_the_references_reference_model(kind):
    """Within 0.5 dB, as kernels may round one step apart."""
    both = BOTH(kind)
    assert sqnr(both.wanted, both.converted(both.x)) > sqnr(both.wanted, both.theirs_reference(both.x)) - 0.5


def test_a_checkpoint_of_the_references_loads_with_equal_outputs(residual):
    """Calibrated on other data, so that nothing is equal by chance."""
    model = made(Residual, seed=5)
    converted = convert_fx(calibrated(model, batches(1)))
    assert converted.state_dict().keys() == residual.theirs.state_dict().keys()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted.load_state_dict(residual.theirs.state_dict())
    assert torch.equal(converted(residual.x), residual.theirs(residual.x))


def test_the_model_and_the_prepared_model_stay_as_they_were(residual):
    assert [type(module) for module in residual.model.stem] == [nn.Conv2d, nn.BatchNorm2d]
    assert convert_fx(residual.prepared)(residual.x).equal(residual.converted(residual.x))


def test_a_converted_model_is_copied_and_pickled(residual):
    wanted = residual.converted(residual.x)
    for again in (copy.deepcopy(residual.converted), pickle.loads(pickle.dumps(residual.converted))):
        assert torch.equal(again(residual.x), wanted)


def test_a_prepared_model_is_copied_and_pickled(residual):
    for again in (copy.deepcopy(residual.prepared), pickle.loads(pickle.dumps(residual.prepared))):
        assert torch.equal(convert_fx(again)(residual.x), residual.converted(residual.x))


def test_the_report_names_every_operator_its_rule_and_its_line(residual):
    decisions = {one.node: one for one in record_of(residual.prepared).decisions}
    assert (decisions["fc"].rule, decisions["fc"].module) == ("Linear", "fc")
    assert decisions["flatten"].source.startswith("nets.py:")
    assert all(one.quantized for one in decisions.values())


def test_the_reference_model_rounds_as_the_quantized_one(residual):
    reference = convert_to_reference_fx(residual.prepared)
    assert sqnr(residual.converted(residual.x), reference(residual.x)) > 30  # clamped to 7 bits there, to 8 here


def test_a_reference_model_is_exported(residual):
    exported = torch.export.export(convert_to_reference_fx(residual.prepared), (residual.x,))
    assert exported.module()(residual.x).shape == (8, 10)


def test_a_converted_model_is_exported(residual):
    """Within a step of the last layer: the kernels of an exported graph round their products in another order."""
    exported = torch.export.export(residual.converted, (residual.x,))
    step = 1.01 * residual.converted.fc.scale  # 0.007 where outputs reach 0.47
    torch.testing.assert_close(exported.module()(residual.x), residual.converted(residual.x), atol=step, rtol=0)


def test_fused_modules_compute_the_same(residual):
    fused = fuse_fx(residual.model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert torch.allclose(fused(residual.x), residual.wanted, atol=1e-4)  # folding reorders sums in float32


# --- functions, sharing -----------------------------------------------------------------------------------------------


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.kernel = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8, 8, 3, 3) / 8)
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        x = self.conv(x)
        x = F.conv2d(x, self.kernel, None, 1, 1)
        x = torch.relu(F.hardtanh(x, -2.0, 2.0) + x)
        x = torch.sigmoid(x.mean([2, 3]))
        return F.relu(F.linear(x, self.weight))


def test_functions_with_constant_weights_become_modules():
    torch.manual_seed(0)
    model, data = Functional().eval(), batches(3, 2, 3, 8, 8)
    converted = convert_fx(calibrated(model, data))
    kinds = {type(module).__name__ for module in converted.modules()}
    assert {"Conv2d", "LinearReLU"} <= kinds
    assert [node.name for node in converted.graph.nodes if node.target == "dequantize"] == ["dequantize"]
    assert sqnr(model(data[0]), converted(data[0])) > 25  # random weights of 6 outputs; torch's has 26.0


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(F.leaky_relu(self.fc(x)))


def test_a_module_that_is_called_twice_has_a_grid_for_each_call():
    torch.manual_seed(0)
    model, data = Twice().eval(), batches(3, 4, 8)
    converted = convert_fx(calibrated(model, data))
    assert sqnr(model(data[0]), converted(data[0])) > 30  # 7 bits, two layers


# --- selection --------------------------------------------------------------------------------------------------------


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = (nn.Sequential(nn.Linear(4, 4)) for _ in range(3))

    def forward(self, x):
        return torch.add(self.head(self.second(self.first(x))), torch.add(x, x))


def quantized_nodes(mapping):
    prepared = prepare_fx(Blocks().eval(), mapping, (torch.randn(2, 4),))
    return {one.node for one in record_of(prepared).decisions if one.quantized}


EVERYTHING = {"first_0", "second_0", "head_0", "add", "add_1"}


@pytest.mark.parametrize(
    ("mapping", "nodes"),
    [
        (QConfigMapping().set_global(default_qconfig), EVERYTHING),
        (QConfigMapping().set_object_type(nn.Linear, default_qconfig), EVERYTHING - {"add", "add_1"}),
        (QConfigMapping().set_object_type(torch.add, default_qconfig), {"add", "add_1"}),
        (QConfigMapping().set_module_name("first", default_qconfig), {"first_0"}),
        (QConfigMapping().set_global(default_qconfig).set_module_name("first", None), EVERYTHING - {"first_0"}),
        (QConfigMapping().set_module_name_regex("(first|head).*", default_qconfig), {"first_0", "head_0"}),
        (QConfigMapping().set_module_name_object_type_order("", torch.add, 1, default_qconfig), {"add_1"}),
        (QConfigMapping().set_module_name_object_type_order("head", nn.Linear, 0, default_qconfig), {"head_0"}),
    ],
)
def test_each_level_of_a_mapping_selects(mapping, nodes):
    assert quantized_nodes(mapping) == nodes


@pytest.mark.parametrize(
    ("mapping", "hint"),
    [
        (QConfigMapping().set_module_name("frist", default_qconfig), "first"),
        (QConfigMapping().set_module_name_regex("block.*", default_qconfig), "block"),
        (QConfigMapping().set_object_type(nn.Conv2d, default_qconfig), "Conv2d"),
        (QConfigMapping().set_object_type(torch.mul, default_qconfig), "torch.mul"),
        (QConfigMapping().set_module_name_object_type_order("", torch.add, 2, default_qconfig), "torch.add 2 times"),
    ],
)
def test_a_key_that_selects_nothing_is_an_error_with_the_nearest_names(mapping, hint):
    with pytest.raises(TargetingError, match=hint):
        quantized_nodes(mapping)


def test_nothing_quantized_is_an_error_unless_it_was_asked_for():
    with pytest.raises(CoverageError, match="uint8"):
        quantized_nodes(QConfigMapping().set_object_type(torch.add, default_dynamic_qconfig))
    assert quantized_nodes(QConfigMapping()) == set()


def test_a_qconfig_that_the_backend_does_not_compute_is_the_reason():
    mapping = QConfigMapping().set_global(default_qconfig).set_object_type(torch.add, default_dynamic_qconfig)
    prepared = prepare_fx(Blocks().eval(), mapping, (torch.randn(2, 4),))
    reasons = {one.node: one.reason for one in record_of(prepared).decisions if not one.quantized}
    assert "dynamic quint8" in reasons["add"]


# --- errors -----------------------------------------------------------------------------------------------------------


def test_observers_without_data_are_named():
    with pytest.raises(CalibrationError, match="first"):
        convert_fx(prepare_fx(Blocks().eval(), MAPPING, (torch.randn(2, 4),)))


def test_example_inputs_that_do_not_fit_are_an_error():
    with pytest.raises(CaptureError, match="example inputs"):
        prepare_fx(Blocks().eval(), MAPPING, (torch.randn(2, 5),))


def test_a_batch_norm_in_training_is_not_folded():
    with pytest.raises(ConversionError, match=r"model\.eval"):
        prepare_fx(made(Residual, train=True), MAPPING, (batches(1)[0],))


def test_a_float_model_is_not_converted():
    with pytest.raises(ConversionError, match=r"convert_fx needs what prepare_fx returned"):
        convert_fx(torch.fx.symbolic_trace(Blocks()))


def test_integers_of_a_converted_model_are_ours(residual):
    assert isinstance(residual.converted.state_dict()["fc._packed_params._packed_params"][0], QTensor)
