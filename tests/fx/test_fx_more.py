"""FX mode beyond static calibration: dynamic, weights alone, training, custom and standalone modules, torch.export."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.ao import quantization as torch_ao
from torch.ao.quantization import quantize_fx as torch_fx
from torch.nn import functional as F

from pt2e_quant import qconfig
from pt2e_quant.backend_config import BackendConfig, BackendPatternConfig, DTypeConfig
from pt2e_quant.errors import CaptureError, CaptureWarning, ConversionError, SpecError, TargetingError
from pt2e_quant.fx.custom_config import ConvertCustomConfig, FuseCustomConfig, PrepareCustomConfig
from pt2e_quant.lowering.executorch import lower_to_executorch
from pt2e_quant.lowering.onnx import lower_to_onnx
from pt2e_quant.nn import quantizable, quantized
from pt2e_quant.nn.quantized import dynamic
from pt2e_quant.pt2e import record_of
from pt2e_quant.qconfig_mapping import (
    QConfigMapping,
    get_default_qat_qconfig_mapping,
    get_default_qconfig_mapping,
)
from pt2e_quant.qtensor import QTensor, quantize_per_tensor
from pt2e_quant.quantize_fx import convert_fx, convert_to_reference_fx, fuse_fx, prepare_fx, prepare_qat_fx
from tests.fx.nets import Dense, InvertedResidual, made
from tests.nets import sqnr

MAPPING = get_default_qconfig_mapping("x86")
TABLES = qconfig.float_qparams_weight_only_qconfig
FOUR_BITS = qconfig.float_qparams_weight_only_qconfig_4bit


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.bag = nn.Embedding(50, 16), nn.EmbeddingBag(50, 16, mode="sum")
        self.lstm, self.gru, self.cell = nn.LSTM(16, 24, batch_first=True), nn.GRU(24, 24), nn.GRUCell(24, 24)
        self.fc, self.relu, self.weight = nn.Linear(24, 16), nn.ReLU(), nn.Parameter(torch.randn(4, 16))

    def forward(self, tokens):
        x, _ = self.lstm(self.table(tokens) + self.bag(tokens).unsqueeze(1))
        x, _ = self.gru(x)
        return F.linear(self.relu(self.fc(self.cell(x[:, -1]))), self.weight)


@pytest.fixture(scope="module")
def text():
    torch.manual_seed(0)
    return Text().eval(), torch.randint(0, 50, (4, 7))


def of_both(text, choose):
    """What ours and torch.ao's return for one choice of qconfigs."""
    model, tokens = text
    converted = convert_fx(prepare_fx(model, choose(QConfigMapping(), qconfig), (tokens,)))
    torch.backends.quantized.engine = "x86"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torch_fx.prepare_fx(copy.deepcopy(model), choose(torch_ao.QConfigMapping(), torch_ao), (tokens,))
        theirs = torch_fx.convert_fx(theirs)
    return converted, sqnr(model(tokens), converted(tokens)), sqnr(model(tokens), theirs(tokens))


def test_dynamic_modules_and_functions_lose_no_more_than_the_references(text):
    choose = lambda mapping, room: mapping.set_global(room.default_dynamic_qconfig)  # noqa: E731
    converted, ours, theirs = of_both(text, choose)
    kinds = {type(module) for module in converted.modules()}
    assert {dynamic.LSTM, dynamic.GRU, dynamic.GRUCell, dynamic.Linear} <= kinds
    assert ours > theirs - 0.5


def test_half_weights_are_the_references(text):
    _, ours, theirs = of_both(text, lambda mapping, room: mapping.set_global(room.float16_dynamic_qconfig))
    assert ours == pytest.approx(theirs, abs=0.5)


def test_tables_alone_are_quantized_and_say_so(text):
    def choose(mapping, room):
        bags = mapping.set_object_type(nn.EmbeddingBag, room.float_qparams_weight_only_qconfig_4bit)
        return bags.set_object_type(nn.Embedding, room.float_qparams_weight_only_qconfig)

    converted, ours, theirs = of_both(text, choose)
    assert isinstance(converted.table, quantized.Embedding)
    assert ours > theirs - 0.5
    assert {one.node for one in record_of(converted).decisions if one.quantized} == {"table", "bag"}


def test_half_activations_are_cast():
    model, x = nn.Sequential(nn.Linear(8, 8)).eval(), torch.randn(4, 8)
    backend = {"configs": [{"pattern": nn.Linear, "dtype_configs": [{"input_dtype": torch.float16}]}]}
    mapping = QConfigMapping().set_global(qconfig.float16_static_qconfig)
    prepared = prepare_fx(model, mapping, (x,), backend_config=backend)
    reference = convert_to_reference_fx(prepared, backend_config=backend)
    wanted = F.linear(x.half().float(), model[0].weight, model[0].bias).half().float()
    assert torch.equal(reference(x), wanted)


# --- training ---------------------------------------------------------------------------------------------------------


def losses(model, data):
    torch.manual_seed(0)
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.002), []
    for x, y in data:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("kind", [InvertedResidual, Dense])
def test_twenty_steps_of_training_lose_what_the_references_lose(kind):
    model, generator = made(kind, train=True), torch.Generator().manual_seed(3)
    data = [
        (torch.randn(8, 3, 32, 32, generator=generator), torch.randint(0, 10, (8,), generator=generator))
        for _ in range(20)
    ]
    ours = prepare_qat_fx(model, get_default_qat_qconfig_mapping("x86"), (data[0][0],))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mapping = torch_ao.get_default_qat_qconfig_mapping("x86")
        theirs = torch_fx.prepare_qat_fx(copy.deepcopy(model), mapping, (data[0][0],))
    assert losses(ours, data) == losses(theirs, data)
    x = data[0][0]
    assert sqnr(ours.eval()(x), convert_fx(ours)(x)) > 20  # rounding flips at edges; torch.ao's has 26


# --- custom and standalone modules ------------------------------------------------------------------------------------


class Gate(nn.Module):
    """Python that no trace follows."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x) if x.shape[0] > 0 and float(x.detach().sum()) > -1e9 else x


class ObservedGate(nn.Module):
    def __init__(self, fc):
        super().__init__()
        self.fc, self.activation_post_process = fc, None

    def forward(self, x):
        return self.activation_post_process(self.fc(x))

    @classmethod
    def from_float(cls, gate):
        made = cls(gate.fc)
        made.fc.qconfig, made.activation_post_process = gate.qconfig, gate.qconfig.activation()
        return made


class PlainGate(nn.Module):
    """It has no observer of its own; `from_observed` finds the one of `prepare_fx`."""

    def __init__(self, fc):
        super().__init__()
        self.fc = fc

    def forward(self, x):
        return self.fc(x)

    @classmethod
    def from_float(cls, gate):
        gate.fc.qconfig = gate.qconfig
        return cls(gate.fc)


class QuantizedGate(nn.Module):
    def __init__(self, fc):
        super().__init__()
        self.fc = fc

    def forward(self, x):
        assert isinstance(x, QTensor)
        return self.fc(x)

    @classmethod
    def from_observed(cls, observed):
        observed.fc.activation_post_process = observed.activation_post_process
        return cls(quantized.Linear.from_float(observed.fc))


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.first, self.inner, self.last, self.note = nn.Linear(8, 8), inner, nn.Linear(8, 8), "kept"

    def forward(self, x):
        return self.last(self.inner(self.first(x)))


DATA = [torch.randn(4, 8, generator=torch.Generator().manual_seed(n)) for n in range(4)]


def converted_around(inner, custom, convert_custom=None, convert=convert_fx):
    torch.manual_seed(0)
    model = Around(inner).eval()
    prepared = prepare_fx(model, MAPPING, (DATA[0],), custom)
    for batch in DATA:
        prepared(batch)
    return model, convert(prepared, convert_custom)


@pytest.mark.parametrize("observed", [ObservedGate, PlainGate])
@pytest.mark.parametrize("convert", [convert_fx, convert_to_reference_fx])
def test_a_custom_module_takes_and_returns_quantized_tensors(convert, observed):
    custom = PrepareCustomConfig().set_float_to_observed_mapping(Gate, observed)
    mapping = ConvertCustomConfig().set_observed_to_quantized_mapping(observed, QuantizedGate)
    model, converted = converted_around(Gate(), custom, mapping, convert)
    assert isinstance(converted.inner, QuantizedGate)
    assert sqnr(model(DATA[0]), converted(DATA[0])) > 25  # 7 bits, three layers


class Sequence(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(8, 8), layer, nn.Linear(8, 4)

    def forward(self, x):
        x = self.first(x)
        y, _ = self.layer(x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)
        return self.last(y)


@pytest.mark.parametrize("kind", ["LSTM", "MultiheadAttention"])
def test_recurrent_layers_and_attention_are_custom_modules(kind):
    torch.manual_seed(0)
    float_class, observed_class = getattr(nn, kind), getattr(quantizable, kind)
    model, data = Sequence(float_class(8, 8 if kind == "LSTM" else 2)).eval(), batches_of(5, 3, 8)
    custom = PrepareCustomConfig().set_float_to_observed_mapping(float_class, observed_class)
    prepared = prepare_fx(model, MAPPING, (data[0],), custom)
    for batch in data:
        prepared(batch)
    mapping = ConvertCustomConfig().set_observed_to_quantized_mapping(observed_class, getattr(quantized, kind))
    with torch.no_grad():
        assert sqnr(model(data[0]), convert_fx(prepared, mapping)(data[0])) > 30  # 7 bits; 39 and 40 dB measured


def batches_of(*shape):
    return [torch.randn(*shape, generator=torch.Generator().manual_seed(n)) for n in range(4)]


def test_a_custom_module_without_a_quantized_class_is_an_error():
    custom = PrepareCustomConfig().set_float_to_observed_mapping(Gate, ObservedGate)
    with pytest.raises(ConversionError, match="set_observed_to_quantized_mapping"):
        converted_around(Gate(), custom)


@pytest.mark.parametrize(
    "custom",
    [
        PrepareCustomConfig().set_non_traceable_module_names(["inner"]),
        PrepareCustomConfig().set_non_traceable_module_classes([Gate]),
    ],
)
def test_a_module_that_is_not_traced_stays_float(custom):
    model, converted = converted_around(Gate(), custom)
    assert type(converted.inner) is Gate
    assert sqnr(model(DATA[0]), converted(DATA[0])) > 25  # 7 bits, two layers


@pytest.mark.parametrize("indexes", [[], [0]])
def test_a_standalone_module_is_prepared_and_converted_by_itself(indexes):
    inside = PrepareCustomConfig().set_input_quantized_indexes(indexes).set_output_quantized_indexes(indexes)
    custom = PrepareCustomConfig().set_standalone_module_name("inner", None, (), inside, None)
    model, converted = converted_around(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), custom)
    assert isinstance(converted.inner.get_submodule("0"), quantized.Linear)
    assert sqnr(model(DATA[0]), converted(DATA[0])) > 22  # 7 bits, three layers, a relu


def test_inputs_and_outputs_are_quantized_tensors_where_that_is_asked_for():
    custom = PrepareCustomConfig().set_input_quantized_indexes([0]).set_output_quantized_indexes([0])
    model, converted = converted_around(nn.ReLU(), custom)
    made = converted(quantize_per_tensor(DATA[0], 1 / 16, 64, torch.quint8))
    assert isinstance(made, QTensor)
    assert sqnr(model(DATA[0]), made.dequantize()) > 22  # 7 bits, two layers, steps of 1/16


def test_preserved_attributes_are_kept_through_copies():
    custom = PrepareCustomConfig().set_preserved_attributes(["note"])
    _, converted = converted_around(nn.ReLU(), custom)
    assert converted.note == copy.deepcopy(converted).note == pickle.loads(pickle.dumps(converted)).note == "kept"
    assert fuse_fx(Around(nn.ReLU()).eval(), FuseCustomConfig().set_preserved_attributes(["note"])).note == "kept"


@pytest.mark.parametrize(
    ("custom", "error"),
    [
        (PrepareCustomConfig().set_non_traceable_module_names(["iner"]), TargetingError),
        (PrepareCustomConfig().set_standalone_module_name("iner", None, (), None, None), TargetingError),
        (PrepareCustomConfig().set_preserved_attributes(["nota"]), CaptureError),
        (PrepareCustomConfig().set_output_quantized_indexes([3]), ConversionError),
        (PrepareCustomConfig().set_input_quantized_indexes([3]), ConversionError),
    ],
)
def test_a_name_or_index_that_does_not_exist_is_an_error(custom, error):
    with pytest.raises(error):
        converted_around(nn.ReLU(), custom)


# --- other backends ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("lower", ["executorch", "onnx"])
def test_a_reference_model_is_exported_and_lowered(lower):
    """Signed types, as XNNPACK wants them: the backend config says that it computes in these."""
    signed = DTypeConfig(torch.qint8, torch.qint8, torch.qint8, torch.float)
    conv = BackendPatternConfig(nn.Conv2d).add_dtype_config(signed).set_root_module(nn.Conv2d)
    backend = BackendConfig("xnnpack").set_backend_pattern_config(
        conv.set_reference_quantized_module(quantized.reference.Conv2d)
    )
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)).eval(), torch.randn(1, 3, 8, 8)
    mapping = QConfigMapping().set_global(qconfig.default_per_channel_symmetric_qnnpack_qconfig)
    prepared = prepare_fx(model, mapping, (x,), backend_config=backend)
    prepared(x)
    reference = convert_to_reference_fx(prepared, backend_config=backend)
    exported = torch.export.export(reference, (x,))
    program = lower_to_executorch(exported) if lower == "executorch" else lower_to_onnx(exported.module(), (x,))
    (step,) = {group.scale for group in record_of(reference).groups[-1:]}
    assert (program.run(x)[0] - reference(x)).abs().max() <= 1.01 * step  # kernels round one step apart


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_with_a_forward_of_its_own_is_quantized_by_what_it_calls():
    torch.manual_seed(0)
    model = nn.Sequential(Doubling(8, 8), nn.Linear(8, 8)).eval()
    prepared = prepare_fx(model, MAPPING, (DATA[0],))
    for batch in DATA:
        prepared(batch)
    converted = convert_fx(prepared)
    assert type(converted._packed_weight_0) is quantized.Linear
    assert sqnr(model(DATA[0]), converted(DATA[0])) > 25  # 7 bits, two layers


# --- configs as dictionaries ------------------------------------------------------------------------------------------


def test_custom_configs_are_the_references_dictionaries():
    from torch.ao.quantization.fx import custom_config as reference

    def filled(package):
        custom = package.PrepareCustomConfig().set_float_to_observed_mapping(Gate, ObservedGate)
        custom.set_standalone_module_name("a", None, (1,), None, None).set_standalone_module_class(
            Gate, None, (), None, None
        )
        custom.set_non_traceable_module_names(["b"]).set_non_traceable_module_classes([Gate]).set_preserved_attributes(
            ["c"]
        )
        custom.set_input_quantized_indexes([0]).set_output_quantized_indexes([1])
        convert = package.ConvertCustomConfig().set_observed_to_quantized_mapping(ObservedGate, QuantizedGate)
        return custom.to_dict(), convert.to_dict(), package.FuseCustomConfig().set_preserved_attributes(["d"]).to_dict()

    from pt2e_quant.fx import custom_config as ours

    assert filled(ours) == filled(reference)
    assert PrepareCustomConfig.from_dict(filled(reference)[0]).to_dict() == filled(ours)[0]
    assert ConvertCustomConfig.from_dict(filled(reference)[1]).to_dict() == filled(ours)[1]
    assert FuseCustomConfig.from_dict(filled(reference)[2]).to_dict() == filled(ours)[2]


@pytest.mark.parametrize(
    "given", [{"standalone_module_name": [3]}, {"float_to_observed_custom_module_class": {"statc": {}}}]
)
def test_a_dictionary_that_fits_nothing_is_an_error(given):
    with pytest.raises(SpecError):
        PrepareCustomConfig.from_dict(given)


# --- what torch.fx cannot trace ---------------------------------------------------------------------------------------


class Branching(nn.Module):
    """Control flow that depends on data, and sizes."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.fc, self.other = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x):
        if x.shape[2] != x.shape[3]:
            x = F.pad(x, (0, x.shape[2] - x.shape[3]))
        x = F.relu(self.norm(self.conv(x))).mean([2, 3])
        return torch.cond(x.sum() > 0, self.fc, self.other, (x,))


def test_control_flow_goes_through_export_and_says_so():
    torch.manual_seed(0)
    model, data = Branching().eval(), [torch.randn(2, 3, 8, 8) for _ in range(3)]
    with pytest.warns(CaptureWarning, match="torch.export captured it"):
        prepared = prepare_fx(model, MAPPING, (data[0],))
    for batch in data:
        prepared(batch)
    converted = convert_fx(prepared, allow_uncalibrated=True)  # the other branch saw no data
    decisions = {one.op: one for one in record_of(converted).decisions}
    assert decisions["aten.conv2d.default"].quantized
    assert decisions["aten.linear.default"].quantized
    with torch.no_grad():
        assert sqnr(model(data[0]), converted(data[0])) > 25  # 7 bits


@pytest.mark.parametrize(
    "custom",
    [
        PrepareCustomConfig().set_output_quantized_indexes([0]),
        PrepareCustomConfig().set_non_traceable_module_names(["fc"]),
        PrepareCustomConfig().set_standalone_module_name("fc", None, (torch.randn(2, 8),), None, None),
    ],
)
def test_settings_that_an_exported_model_cannot_hold_are_errors(custom):
    with pytest.raises(CaptureError, match=f"{next(iter(custom.to_dict()))} of prepare_custom_config cannot hold"):
        prepare_fx(Branching().eval(), MAPPING, (torch.randn(2, 3, 8, 8),), prepare_custom_config=custom)


def test_what_nothing_captures_names_both_reasons():
    model = Around(Gate()).eval()
    model.inner.fc = nn.Linear(3, 3)  # does not fit either
    with pytest.raises(CaptureError, match="neither be traced nor exported"):
        prepare_fx(model, MAPPING, (DATA[0],))
