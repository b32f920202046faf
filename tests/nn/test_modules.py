"""Constructors, attributes, conversions from float and reference modules, copies, errors, and the table of rows."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from pt2e_quant import QuantizationError
from pt2e_quant.eager import prepare
from pt2e_quant.nn import intrinsic, load_quantized, quantized
from pt2e_quant.nn.quantized import reference
from pt2e_quant.nn.rows import ROWS, dynamic_classes, quantized_classes, reference_classes, row_of
from pt2e_quant.observer import default_weight_observer
from pt2e_quant.qconfig import default_per_channel_qconfig, float_qparams_weight_only_qconfig
from pt2e_quant.qtensor import QTensor, quantize_per_tensor
from pt2e_quant.sqnr import sqnr
from tests.nn.cases import DYNAMIC, MODULES, ours, theirs

CASES = {**MODULES, **DYNAMIC}
STATIC = sorted({type(case(ours())[0]) for case in CASES.values()}, key=lambda kind: (kind.__module__, kind.__name__))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", STATIC, ids=lambda kind: f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}")
def test_constructors_take_the_references_arguments(kind: type) -> None:
    of = theirs()
    rooms = {"dynamic": (of.qd, of.iqd), "fused": (of.iq,)}.get(kind.__module__.rpartition(".")[2], (of.q, of.iq))
    their = next(getattr(room, kind.__name__) for room in rooms if hasattr(room, kind.__name__))
    static = kind.__mro__[3] if kind.__module__.endswith("dynamic") and "Conv" in kind.__name__ else kind
    taken = [list(inspect.signature(one).parameters) for one in (their, static)]
    wanted, made = ([name for name in names if name not in ("args", "kwargs", "reduce_range")] for names in taken)
    assert made[: len(wanted)] == wanted


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith(("Quantize", "DeQuantize"))])
def test_modules_print_as_the_references(name: str) -> None:
    assert str(CASES[name](ours())[0]) == str(CASES[name](theirs())[0])


@pytest.mark.parametrize("name", ["Linear", "ConvReLU2d", "Embedding, 4 bits", "dynamic Linear"])
def test_modules_survive_copies_and_pickles(name: str) -> None:
    module, arguments = CASES[name](ours())
    wanted = module(*arguments).dequantize() if isinstance(module(*arguments), QTensor) else module(*arguments)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        made = other(*arguments)
        assert torch.equal(made.dequantize() if isinstance(made, QTensor) else made, wanted)


def observed(module: Any, x: torch.Tensor) -> Any:
    """A float module as prepare leaves it."""
    module.qconfig = default_per_channel_qconfig
    module.activation_post_process = default_per_channel_qconfig.activation()
    module.activation_post_process(module(x).detach())
    return module


FLOATS = {
    "Linear": (nn.Linear(12, 5), (3, 12)),
    "Conv2d": (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 5)),
    "Conv1d": (nn.Conv1d(4, 6, 3, groups=2), (2, 4, 5)),
    "Hardswish": (nn.Hardswish(), (2, 4)),
    "ELU": (nn.ELU(0.5), (2, 4)),
    "LeakyReLU": (nn.LeakyReLU(0.2), (2, 4)),
    "Sigmoid": (nn.Sigmoid(), (2, 4)),
    "Softmax": (nn.Softmax(1), (2, 4)),
    "LayerNorm": (nn.LayerNorm(4), (2, 4)),
    "GroupNorm": (nn.GroupNorm(2, 4), (2, 4, 3)),
    "InstanceNorm2d": (nn.InstanceNorm2d(4, affine=True), (2, 4, 3, 3)),
    "BatchNorm2d": (nn.BatchNorm2d(4).eval(), (2, 4, 3, 3)),
}


@pytest.mark.parametrize("name", FLOATS)
def test_from_float_is_the_float_module_to_the_grids(name: str) -> None:
    kind, shape = FLOATS[name]
    x = quantize_per_tensor(torch.randn(shape, generator=torch.Generator().manual_seed(1)), 1 / 32, 128, torch.quint8)
    module = observed(copy.deepcopy(kind), x.dequantize())
    made: Any = quantized_classes()[name]
    result = made.from_float(module)(x)
    wanted = module(x.dequantize())
    # the observer of activations leaves one bit unused: steps of 1/127 of the range; weights move sums by as much
    assert (result.dequantize() - wanted).abs().max() <= 2 * result.q_scale()


def test_a_trained_convolution_is_folded_and_quantized_with_its_own_observer() -> None:
    module: Any = nn.Conv2d(4, 6, 3)
    module.bn, module.weight_fake_quant = nn.BatchNorm2d(6).eval(), default_weight_observer()
    with torch.no_grad():
        module.bn.running_var.fill_(4.0)
    module.activation_post_process = default_per_channel_qconfig.activation()
    module.activation_post_process(torch.tensor([-1.0, 1.0]))
    made = quantized.Conv2d.from_float(module)
    step = made.weight().q_scale()
    assert (made.weight().dequantize() - module.weight.detach() / 2).abs().max() <= step / 2 * 1.01


def test_an_embedding_is_quantized_row_by_row() -> None:
    module: Any = nn.Embedding(10, 12)
    module.qconfig = float_qparams_weight_only_qconfig
    made = quantized.Embedding.from_float(module)
    rows = module.weight.detach()
    steps = (rows.amax(1) - rows.amin(1)) / 255
    assert ((made(torch.arange(10)) - rows).abs().amax(1) <= steps / 2 * 1.01).all()


PER_CHANNEL = {"qscheme": torch.per_channel_affine, "dtype": torch.qint8, "axis": 0}
PER_TENSOR = {"qscheme": torch.per_tensor_affine, "dtype": torch.qint8, "scale": 0.01, "zero_point": 0}


@pytest.mark.parametrize("name", ["Linear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d"])
def test_reference_modules_round_and_become_quantized_ones(name: str) -> None:
    sizes = (4, 6) if name == "Linear" else (4, 6, 2)
    module = getattr(nn, name)(*sizes)
    grid = (
        PER_TENSOR
        if "Transpose" in name
        else {**PER_CHANNEL, "scale": torch.full((6,), 0.01), "zero_point": torch.zeros(6)}
    )
    grid = {**grid, "zero_point": torch.zeros(6, dtype=torch.int32) if "axis" in grid else 0}
    ref = getattr(reference, name).from_float(module, grid)
    assert (ref.get_weight() - module.weight).abs().max() <= 0.005001
    spatial = 0 if name == "Linear" else int(name[-2])
    x = quantize_per_tensor(torch.randn(2, 4, *[5] * spatial), 1 / 32, 128, torch.quint8)
    made = quantized_classes()[name].from_reference(ref, 1 / 32, 128)  # type: ignore[attr-defined]
    inside = (ref(x.dequantize()) * 32 + 128).round().clamp(0, 255)
    assert (made(x).int_repr() - inside).abs().max() <= 1
    assert isinstance(dynamic_classes()[name].from_reference(ref)(x.dequantize()), torch.Tensor)  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["Linear", "Conv2d", "ConvTranspose2d", "Embedding", "LSTM", "GRU", "LSTMCell", "GRUCell", "RNNCell"]
)
def test_state_dicts_of_reference_modules_go_both_ways(name: str) -> None:
    import torch.ao.nn.quantized.reference as theirs_

    sizes = (4, 3, 2) if "Conv" in name else (4, 3)
    their, our = getattr(theirs_, name)(*sizes), getattr(reference, name)(*sizes)
    our.load_state_dict(their.state_dict())
    assert set(our.state_dict()) == set(their.state_dict())
    their.load_state_dict(our.state_dict())


@pytest.mark.parametrize("name", ["LSTM", "GRU", "LSTMCell", "GRUCell", "RNNCell"])
def test_recurrent_reference_layers_compute_with_rounded_weights(name: str) -> None:
    module = getattr(nn, name)(4, 3)
    grids = {n: PER_TENSOR for n, _ in module.named_parameters() if n.startswith("weight")}
    ref = getattr(reference, name).from_float(module, grids)
    with torch.no_grad():
        for parameter, value in module.named_parameters():
            if parameter.startswith("weight"):
                value.copy_((value / 0.01).round() * 0.01)
    x = torch.randn(5, 2, 4) if name in ("LSTM", "GRU") else torch.randn(2, 4)
    torch.testing.assert_close(ref(x), module(x))


@pytest.mark.parametrize("name", ["Linear", "Conv2d", "Hardswish", "LayerNorm", "QFunctional"])
def test_a_float_input_is_told_where_a_quant_stub_belongs(name: str) -> None:
    call = quantized.QFunctional().add_relu if name == "QFunctional" else CASES[name](ours())[0]
    arguments = (torch.ones(2, 4, 4, 4),) * (2 if name == "QFunctional" else 1)
    with pytest.raises(QuantizationError, match="Put a QuantStub in front of it"):
        call(*arguments)


def test_impossible_modules_are_refused() -> None:
    for make in (
        lambda: quantized.Conv2d(3, 4, 1, groups=2),
        lambda: quantized.Conv3d(4, 4, 1, padding_mode="reflect"),
        lambda: quantized.Conv2d(4, 4, (1, 2, 3)),
        lambda: quantized.Linear(4, 4, dtype=torch.quint8),
        lambda: quantized.Embedding(4, 4, dtype=torch.qint8),
        lambda: quantized.Linear(4, 4).set_weight_bias(torch.zeros(4, 4), None),
        lambda: quantized.Linear.from_float(nn.Linear(2, 2)),
        lambda: quantized.FloatFunctional()(torch.ones(1)),
        lambda: quantized.Conv2d(4, 4, 1)(quantize_per_tensor(torch.ones(2, 4), 1.0, 0, torch.quint8)),
    ):
        with pytest.raises(QuantizationError):
            make()


def test_every_row_leads_to_classes_that_name_it() -> None:
    for name, kind in {**quantized_classes(), **dynamic_classes()}.items():
        assert getattr(kind, "row", ROWS[name]) is ROWS[name]
    assert {row.float for row in ROWS.values() if row.quantized} == set(quantized_classes())
    assert {row.float for row in ROWS.values() if row.dynamic} == set(dynamic_classes())
    assert {row.float for row in ROWS.values() if row.reference} == set(reference_classes())


def test_an_instance_norm_of_one_element_is_its_bias() -> None:
    weight, bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.arange(4.0))
    made = quantized.InstanceNorm1d(4, weight, bias, 0.5, 3)(ours().x(2, 4, 1))
    assert made.int_repr().squeeze(2).tolist() == [[3, 5, 7, 9]] * 2


def test_a_subclass_has_the_row_of_its_base() -> None:
    class Mine(nn.Linear):
        pass

    assert row_of(Mine(2, 2)) is ROWS["Linear"]
    assert row_of(nn.Identity()) is None


def test_float_functional_shows_its_results() -> None:
    module, seen = quantized.FloatFunctional(), []
    module.activation_post_process = nn.Identity()
    module.activation_post_process.register_forward_hook(lambda m, i, o: seen.append(float(o)))
    one = torch.tensor([[1.0]])
    module.add(one, one), module.mul(one, one), module.add_relu(one, -3 * one), module.matmul(one, one)
    module.add_scalar(one, 5.0), module.mul_scalar(one, 5.0)
    assert seen == [2.0, 1.0, 0.0, 1.0]


def test_a_module_moves_and_stays_whole_when_made_half() -> None:
    module, arguments = CASES["Conv2d"](ours())
    wanted = module(*arguments).int_repr()
    assert torch.equal(module.half().to("cpu")(*arguments).int_repr(), wanted)


def test_an_observed_convolution_with_a_sum_is_quantized_and_loaded() -> None:
    def fused() -> Any:
        return intrinsic.ConvAddReLU2d(nn.Conv2d(4, 6, 3, padding=1), torch.add, nn.ReLU()).eval()

    torch.manual_seed(0)
    model = fused()
    model.qconfig = default_per_channel_qconfig
    x, y = (quantize_per_tensor(torch.rand(2, n, 5, 5) - 0.5, 1 / 256, 128, torch.quint8) for n in (4, 6))
    prepared = prepare(model)
    wanted = prepared(x.dequantize(), y.dequantize())
    made: Any = intrinsic.quantized.ConvAddReLU2d.from_float(prepared)
    assert sqnr(wanted, made(x, y).dequantize()) > 35  # 8 bits for the weight and 7 for the result, half of it zeros
    loaded: Any = load_quantized(fused(), made.state_dict())
    assert torch.equal(loaded(x, y).int_repr(), made(x, y).int_repr())
