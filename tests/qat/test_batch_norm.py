"""Batch norm trains in a prepared model as in the float one, on weights rounded as they will be once it is folded."""

from __future__ import annotations

import copy
import itertools
import operator
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pt2e_quant import (
    check_converted,
    convert_pt2e,
    disable_fake_quant,
    enable_fake_quant,
    explain,
    freeze_bn_stats,
    prepare_qat_pt2e,
)
from pt2e_quant.batch_norm import by_channel, gamma_over_sigma
from pt2e_quant.quantizer import QuantizationConfig, QuantizationSpec
from tests.nets import export, randomize
from tests.pt2e.kit import Toy, calls, relative_error, symmetric_by_hand, the_call
from tests.qat.kit import TRAINED, AllConvs, images, prepared, settle, sgd

aten = torch.ops.aten

FLOAT = 1e-5  # relative: the scale is multiplied in and divided out, and summed over tens of float32 products
LAYERS: dict[str, Any] = {
    "conv1d": (nn.Conv1d, nn.BatchNorm1d), "conv2d": (nn.Conv2d, nn.BatchNorm2d), "conv3d": (nn.Conv3d, nn.BatchNorm3d),
    "transposed 1d": (nn.ConvTranspose1d, nn.BatchNorm1d), "transposed 2d": (nn.ConvTranspose2d, nn.BatchNorm2d),
    "transposed 3d": (nn.ConvTranspose3d, nn.BatchNorm3d), "linear": (nn.Linear, nn.BatchNorm1d),
}  # fmt: skip
AFTER = {"relu": nn.ReLU, "relu6": nn.ReLU6, "hardswish": nn.Hardswish, "none": nn.Identity}


def block(kind: str, bias: bool, padding: Any, groups: int, affine: bool, after: str) -> tuple[nn.Module, Tensor]:
    """layer - norm - activation, twice, with an input for it."""
    layer, norm = LAYERS[kind]
    rank = 0 if kind == "linear" else int(norm.__name__[-2])

    def one(inputs: int) -> list[nn.Module]:
        if kind == "linear":
            made = layer(inputs, 6, bias=bias)
        elif kind.startswith("transposed"):
            made = layer(inputs, 6, 3, bias=bias, padding=1, groups=1)
        else:
            made = layer(inputs, 6, 3, bias=bias, padding=padding, groups=groups)
        return [made, norm(6, eps=1e-3, momentum=0.03, affine=affine), AFTER[after]()]

    return nn.Sequential(*one(6), *one(6)), images(1, 4, 6, *[7] * rank)


BLOCKS = st.builds(
    block,
    st.sampled_from(sorted(LAYERS)), st.booleans(), st.sampled_from([0, 1, "same", "valid"]),
    st.sampled_from([1, 2, 6]), st.booleans(), st.sampled_from(sorted(AFTER)),
)  # fmt: skip


def check_block(made: tuple[nn.Module, Tensor], train: bool, strict: bool, frozen: bool) -> None:
    model, x = made
    graph = prepared(model, x, train=train, strict=strict)
    assert graph.training is train
    eager = copy.deepcopy(model)
    graph.train()
    if frozen:
        freeze_bn_stats(graph)
    sgd(graph, [images(seed, *x.shape) for seed in range(2, 5)])
    settle(graph)
    trained = graph.state_dict()
    eager.load_state_dict({name: trained.get(name, value) for name, value in eager.state_dict().items()})
    disable_fake_quant(graph)
    assert relative_error(graph(x), eager.eval()(x)) <= FLOAT
    enable_fake_quant(graph)
    converted = convert_pt2e(graph)
    check_converted(graph, converted, [x, images(9, *x.shape)])
    assert calls(converted, aten.batch_norm.default) == []


@given(made=BLOCKS, train=st.booleans(), strict=st.booleans(), frozen=st.booleans())
@settings(max_examples=4)
def test_a_random_block_is_the_float_one_without_rounding_and_the_converted_one_with_it(made, train, strict, frozen):
    check_block(made, train, strict, frozen)


@pytest.mark.slow
@given(made=BLOCKS, train=st.booleans(), strict=st.booleans(), frozen=st.booleans())
@settings(max_examples=60)
def test_many_random_blocks(made, train, strict, frozen):
    check_block(made, train, strict, frozen)


# --- against the peer -------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """conv - norm - relu, four times."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        widths = (3, 8, 6, 8, 4)
        for index, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            self.add_module(f"conv{index}", nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias))
            self.add_module(f"norm{index}", nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.03))
            self.add_module(f"relu{index}", nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        for index in range(4):
            x = getattr(self, f"conv{index}")(x)
            x = getattr(self, f"norm{index}")(x)
            x = getattr(self, f"relu{index}")(x)
        return x


def peer_qconfig() -> Any:
    from torch.ao import quantization as ao

    activation = ao.FakeQuantize.with_args(
        observer=ao.MovingAverageMinMaxObserver, dtype=torch.quint8, quant_min=0, quant_max=255,
        qscheme=torch.per_tensor_affine, averaging_constant=0.3,
    )  # fmt: skip
    weight = ao.FakeQuantize.with_args(
        observer=ao.MovingAveragePerChannelMinMaxObserver, dtype=torch.qint8, quant_min=-127, quant_max=127,
        qscheme=torch.per_channel_symmetric, ch_axis=0, averaging_constant=1.0,
    )  # fmt: skip
    return ao.QConfig(activation=activation, weight=weight)


def in_eager_mode(model: nn.Module) -> nn.Module:
    """torch.ao's own QAT modules, ConvBnReLU2d, with a fake quantizer on the input."""
    from torch.ao import quantization as ao

    names = [[f"{part}{index}" for part in ("conv", "norm", "relu")] for index in range(4)]
    fused = ao.fuse_modules_qat(copy.deepcopy(model).train(), names)
    whole = nn.Sequential(ao.QuantStub(), fused)
    whole.qconfig = peer_qconfig()
    return ao.prepare_qat(whole, inplace=True)


def in_a_graph(model: nn.Module, x: Tensor, strict: bool) -> nn.Module:
    qconfig = peer_qconfig()
    act = QuantizationSpec(torch.uint8, qconfig.activation, 0, 255, torch.per_tensor_affine)
    weight = QuantizationSpec(torch.int8, qconfig.weight, -127, 127, torch.per_channel_symmetric, ch_axis=0)
    exported = torch.export.export(copy.deepcopy(model).train(), (x,), strict=strict)
    return prepare_qat_pt2e(exported, Toy().set_global(QuantizationConfig(act, act, weight, is_qat=True)))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_twenty_steps_are_those_of_eager_mode(bias, strict):
    """Losses and weights within 1e-4, the bound of the issue; both round with torch.ao's own fake quantizers."""
    model = randomize(Stack(bias))
    x = images(1, 4, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao announces its end
        theirs = in_eager_mode(model)
        ours = in_a_graph(model, x, strict)
    batches = [images(seed, 4, 3, 8, 8) for seed in range(20)]
    assert sgd(ours, batches) == pytest.approx(sgd(theirs, batches), abs=1e-4)
    trained = ours.state_dict()
    for index in range(4):
        theirs_conv = getattr(theirs[1], f"conv{index}")
        pairs = [(f"conv{index}.weight", theirs_conv.weight), (f"norm{index}.weight", theirs_conv.bn.weight)]
        pairs += [(f"norm{index}.running_var", theirs_conv.bn.running_var)]
        for name, value in pairs:
            torch.testing.assert_close(trained[name], value, rtol=0, atol=1e-4)


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_the_formula_in_float64():
    """Straight through: the rounded weight is w * s + c with a constant c, inside of a range that w * s spans."""
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3, momentum=0.03)
    x, model = images(1, 5, 3, 7, 7), nn.Sequential(conv, norm)
    weights = QuantizationConfig(None, None, TRAINED.weight, is_qat=True)
    graph = prepare_qat_pt2e(export(model, x, train=True), Toy().set_global(weights))
    graph(x).sin().sum().backward()

    w, b, gamma, beta = (p.detach().double().requires_grad_() for p in model.parameters())
    scale = gamma / torch.sqrt(torch.ones(4).double() * norm_start(model) + 1e-3)
    folded = w * scale.reshape(-1, 1, 1, 1)
    step = symmetric_by_hand(folded.detach())
    rounded = folded + (torch.round(folded / step) * step - folded).detach()
    y = nn.functional.conv2d(x.double(), rounded) / scale.reshape(1, -1, 1, 1) + b.reshape(1, -1, 1, 1)
    mean, var = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), keepdim=True, unbiased=False)
    out = (y - mean) / torch.sqrt(var + 1e-3) * gamma.reshape(1, -1, 1, 1) + beta.reshape(1, -1, 1, 1)
    out.sin().sum().backward()
    named = dict(graph.named_parameters())
    for name, expected in zip(("0.weight", "1.weight", "1.bias"), (w, gamma, beta), strict=True):
        torch.testing.assert_close(named[name].grad.double(), expected.grad, rtol=1e-4, atol=1e-4)
    assert float(named["0.bias"].grad.abs().max()) < 1e-4  # batch norm takes a bias away


def norm_start(model: nn.Module) -> Tensor:
    """The running variance before the first batch: what `randomize` gave it. The model itself did not run."""
    return model[1].running_var.double()


def test_the_formula_is_the_folded_layer():
    """s = gamma / sqrt(var + eps): 3 / sqrt(3.99 + 0.01) = 1.5; where gamma is 0, the scale is 1."""
    scale = gamma_over_sigma(torch.tensor([3.0, 0.0]), torch.tensor([3.99, 0.24]), 0.01)
    torch.testing.assert_close(scale, torch.tensor([1.5, 1.0]))
    torch.testing.assert_close(gamma_over_sigma(None, torch.tensor([3.99]), 0.01), torch.tensor([0.5]))
    weight = torch.ones(4, 1, 5)  # transposed, 2 groups, one output channel in each
    transposed = by_channel(operator.mul, weight, scale, 2)
    torch.testing.assert_close(transposed[:, 0, 0], torch.tensor([1.5, 1.5, 1.0, 1.0]))
    torch.testing.assert_close(by_channel(operator.truediv, transposed, scale, 2), weight)
    torch.testing.assert_close(by_channel(operator.mul, torch.ones(2, 3), scale, None)[:, 0], torch.tensor([1.5, 1.0]))


def test_a_channel_whose_gamma_is_zero_trains_and_converts():
    """As in residual blocks that start as the identity: eager QAT divides 0 by 0 there."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    x = images(1, 5, 3, 7, 7)
    exported = export(model, x, train=True)
    with torch.no_grad():
        model[1].weight[1:3] = 0
    graph = prepare_qat_pt2e(exported, Toy().set_global(TRAINED))
    assert bool(graph(x).isfinite().all())
    check_converted(graph, convert_pt2e(graph), [x])
    sgd(graph, [x])
    assert bool((graph.state_dict()["1.weight"] != 0).all())
    check_converted(settle(graph), convert_pt2e(graph), [x])


# --- models -----------------------------------------------------------------------------------------------------------


class Reused(nn.Module):
    """One conv and norm called twice, a residual, a conv with two norms of its own, a norm that stands alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, eps=1e-3, momentum=0.03)
        self.shared = nn.Conv2d(4, 4, 1)
        self.one, self.two = nn.BatchNorm2d(4, eps=1e-3), nn.BatchNorm2d(4, eps=1e-2)
        self.alone = nn.BatchNorm2d(4, momentum=0.03)
        self.layer = nn.LayerNorm(7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(torch.relu(self.norm(self.conv(self.alone(x)))))) + x
        return self.layer(self.one(self.shared(x)) + self.two(self.shared(torch.relu(x))))


@pytest.mark.parametrize("train", [True, False])
def test_reused_modules_residuals_and_norms_that_stand_alone_train_and_convert(train):
    x = images(1, 4, 4, 7, 7)
    graph = prepare_qat_pt2e(export(Reused(), x, train=train), Toy().set_global(TRAINED)).train()
    losses = sgd(graph, [x] * 12, lr=0.02)
    assert losses[-1] < 0.8 * losses[0]
    converted = convert_pt2e(settle(graph))
    check_converted(graph, converted, [x, images(2, *x.shape)])
    (norm,) = calls(converted, aten.batch_norm.default)
    assert "alone" in str(norm.args[1])
    assert "its input is not computed by a convolution or linear" in str(explain(graph))


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.yes = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, eps=1e-3))
        self.no = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4, eps=1e-2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, self.yes, self.no, (x,))


def test_batch_norms_in_branches_train_and_convert():
    x = images(1, 16, 3)
    graph = prepare_qat_pt2e(export(Branch(), x.abs()), Toy().set_global(TRAINED)).train()
    before = graph.state_dict()["yes.1.running_mean"].clone() if "yes.1.running_mean" in graph.state_dict() else None
    losses = sgd(graph, [x.abs(), -x.abs()] * 4, lr=0.02)
    assert losses[-1] < losses[1]
    assert before is None or not torch.equal(before, graph.state_dict()["yes.1.running_mean"])
    check_converted(settle(graph), convert_pt2e(graph), [x.abs(), -x.abs()])


def test_a_layer_in_float_keeps_its_batch_norm_until_convert():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    x = images(1, 4, 3, 9, 9)
    quantizer = Toy().set_global(TRAINED).set_module_name("0", None)
    graph = prepare_qat_pt2e(export(model, x), quantizer).train()
    first, second = calls(graph, aten.batch_norm.default)
    assert first.args[0].target is aten.conv2d.default
    assert second.args[0].args[1].target is aten.div.Tensor
    sgd(graph, [x] * 3)
    converted = convert_pt2e(settle(graph))
    check_converted(graph, converted, [x])
    assert calls(converted, aten.batch_norm.default) == []


def test_statistics_of_the_batch_alone_stay_and_are_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    x = images(1, 4, 3, 7, 7)
    graph = prepare_qat_pt2e(export(model, x), Toy().set_global(TRAINED))
    assert "it has no running statistics (track_running_stats=False)" in str(explain(graph))
    sgd(graph.train(), [x] * 2)
    converted = convert_pt2e(settle(graph))
    check_converted(graph, converted, [x])
    assert the_call(converted, aten.batch_norm.default).args[5] is True


def test_what_comes_in_a_form_for_inference_is_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    exported = export(model, images(1, 4, 3, 7, 7)).run_decompositions({})
    graph = prepare_qat_pt2e(exported, AllConvs().set_global(TRAINED))
    assert "is a form for inference" in str(explain(graph))


def test_literals_and_the_callers_model_stay_as_they_were():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3, momentum=0.03), nn.Dropout(0.15))
    exported = export(model, images(1, 4, 3, 7, 7))
    before = copy.deepcopy(exported.state_dict)
    graph = prepare_qat_pt2e(exported, Toy().set_global(TRAINED))
    for mode in (True, True, False, True, False):
        graph.train(mode)
        assert the_call(graph, aten.batch_norm.default).args[5:8] == (mode, 0.03, 1e-3)
        assert the_call(graph, aten.dropout.default).args[1:] == (0.15, mode)
    sgd(graph.train(), [images(1, 4, 3, 7, 7)])
    assert all(torch.equal(value, exported.state_dict[name]) for name, value in before.items())
    assert not torch.equal(graph.state_dict()["0.weight"], before["0.weight"])


def test_training_may_go_on_after_convert():
    """And converting twice gives the same integers."""
    x = images(1, 4, 3, 7, 7)
    graph = prepared(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), x).train()
    sgd(graph, [x] * 2)
    converted, again = convert_pt2e(graph), convert_pt2e(graph)
    assert not converted.training
    states = converted.state_dict(), again.state_dict()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    expected = converted(x)
    sgd(graph, [x] * 2)
    assert torch.equal(converted(x), expected)
