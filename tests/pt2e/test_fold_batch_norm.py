"""Batch norm in inference mode disappears into the layer before it, or stays and says why."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.ops import BATCH_NORM
from tests.nets import export, randomize
from tests.pt2e.kit import STATIC, Nothing, Toy, calls, relative_error

aten = torch.ops.aten

# Folding multiplies each float32 weight before the sum instead of the sum after it: one rounding (2**-24) more for
# each of the at most 54 products of a sum, relative to the largest result.
REASSOCIATION = 1e-5

SHAPES = {1: (9,), 2: (9, 7), 3: (5, 6, 5)}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSE = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def captured(model: nn.Module | torch.export.ExportedProgram, *inputs: Tensor) -> torch.fx.GraphModule:
    """What prepare makes of a model, exported already when there are no inputs, before any quantizer touches it."""
    return prepare_pt2e(export(model, *inputs) if inputs else model, Nothing(), allow_empty=True)


def norms(gm: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return calls(gm, *BATCH_NORM)


def reasons(gm: torch.fx.GraphModule) -> list[str | None]:
    """Why batch norms stayed."""
    return [decision.reason for decision in explain(gm).skipped if "batch_norm" in decision.op]


def folds(module: nn.Module, *inputs: Tensor) -> torch.fx.GraphModule:
    """Assert that no batch norm is left and that the values are those of the eager model."""
    gm = captured(module, *inputs)
    assert norms(gm) == []
    assert relative_error(gm(*inputs), module(*inputs)) < REASSOCIATION
    return gm


def stays(module: nn.Module, *inputs: Tensor) -> list[str | None]:
    """Assert that the values are those of the eager model to the last bit; the reasons for what was not folded."""
    gm = captured(module, *inputs)
    torch.testing.assert_close(gm(*inputs), module(*inputs), rtol=0, atol=0)
    return reasons(gm)


class Chain(nn.Module):
    """A layer and the batch norms after it, under names that tests can look for."""

    def __init__(self, layer: nn.Module, *norms: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.norms = nn.ModuleList(norms)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        for norm in self.norms:
            x = norm(x)
        return x


class Twice(nn.Module):
    """One convolution and one batch norm, called for two inputs, the batch norms in the other order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 6, 3)
        self.norm = nn.BatchNorm1d(6, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.conv(x), self.conv(x * 2)
        late = self.norm(second)
        return torch.cat([self.norm(first), late], 1)


class SharedWeight(nn.Module):
    """Two call sites share a convolution but have batch norms of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, bias=False)
        self.one = nn.BatchNorm2d(5, eps=1e-3)
        self.other = nn.BatchNorm2d(5, eps=1e-2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(self.conv(x)), self.other(self.conv(x * 2))], 1)


class TwoNorms(nn.Module):
    """One convolution whose result two batch norms read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.one = nn.BatchNorm2d(5, eps=1e-3)
        self.other = nn.BatchNorm2d(5, eps=1e-2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.one(x) + self.other(x)


class WithBufferWeight(nn.Module):
    """A convolution whose weight is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", torch.randn(4, 3, 3, 3))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.conv2d(x, self.w))


# --- what folds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("padding", [1, "same", "valid"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_convolution_takes_up_its_batch_norm(dims, bias, padding, affine):
    conv = CONV[dims](4, 6, 3, padding=padding, dilation=1 if dims == 3 else 2, groups=2, bias=bias)
    folds(Chain(conv, NORM[dims](6, eps=1e-3, affine=affine)), torch.randn(2, 4, *SHAPES[dims]))


@pytest.mark.parametrize(
    ("dims", "bias", "groups", "affine"), list(itertools.product((1, 2), (True, False), (1, 2), (True, False)))
)
def test_a_transposed_convolution_takes_up_its_batch_norm(dims, bias, groups, affine):
    conv = CONV_TRANSPOSE[dims](4, 6, 3, stride=2, output_padding=1, groups=groups, bias=bias)
    folds(Chain(conv, NORM[dims](6, eps=1e-3, affine=affine)), torch.randn(2, 4, *SHAPES[dims]))


@pytest.mark.parametrize(("bias", "affine"), list(itertools.product((True, False), (True, False))))
def test_a_linear_takes_up_its_batch_norm(bias, affine):
    folds(Chain(nn.Linear(7, 6, bias=bias), nn.BatchNorm1d(6, eps=1e-3, affine=affine)), torch.randn(4, 7))


def test_batch_norms_behind_each_other_all_fold():
    gm = folds(Chain(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, eps=1e-3), nn.BatchNorm2d(6)), torch.randn(2, 3, 6, 6))
    assert sorted(gm.state_dict()) == ["layer.bias", "layer.weight"]


def test_a_module_called_twice_folds_once_into_parameters_that_both_calls_share():
    gm = folds(Twice(), torch.randn(2, 3, 8))
    first, second = calls(gm, aten.conv1d.default)
    assert first.args[1:3] == second.args[1:3]
    assert sorted(gm.state_dict()) == ["conv.bias", "conv.weight"]


class TwiceAndOnce(Twice):
    """The same, with a further batch norm after one of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.further = nn.BatchNorm1d(6, eps=1e-2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.further(self.norm(self.conv(x))), self.norm(self.conv(x * 2))], 1)


def test_a_module_called_twice_folds_apart_where_more_stands_behind_one_call():
    gm = folds(TwiceAndOnce(), torch.randn(2, 3, 8))
    first, second = calls(gm, aten.conv1d.default)
    assert first.args[1] is not second.args[1]


class TwiceWithAnotherEps(Twice):
    """The same, with another eps in one of the calls and nothing else that differs."""

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        statistics = norm.running_mean, norm.running_var, norm.weight, norm.bias
        return torch.cat([norm(self.conv(x)), F.batch_norm(self.conv(x * 2), *statistics, eps=0.5)], 1)


def test_a_module_called_twice_folds_apart_where_eps_differs():
    gm = folds(TwiceWithAnotherEps(), torch.randn(2, 3, 8))
    first, second = calls(gm, aten.conv1d.default)
    assert first.args[1] is not second.args[1]


class Functional(nn.Module):
    """A batch norm whose result two others read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.one, self.other = nn.Conv1d(3, 6, 3), *(nn.BatchNorm1d(6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return self.one(x) + self.other(x)


@pytest.mark.parametrize("decompose", [True, False], ids=["core aten", "aten"])
def test_batch_norms_behind_a_folded_one_stay_where_it_has_two_readers(decompose):
    x = torch.randn(2, 3, 8)
    model = randomize(Functional()).eval()
    exported = torch.export.export(model, (x,))
    gm = captured(exported.run_decompositions() if decompose else exported)
    assert len(norms(gm)) == 2
    assert relative_error(gm(x), model(x)) < REASSOCIATION


def test_a_weight_shared_by_two_batch_norms_becomes_two_weights():
    gm = folds(SharedWeight(), torch.randn(2, 3, 6, 6))
    first, second = calls(gm, aten.conv2d.default)
    assert first.args[1] is not second.args[1]


def test_a_weight_that_is_a_buffer_folds_under_its_name():
    gm = folds(WithBufferWeight(), torch.randn(1, 3, 6, 6))
    assert set(gm.state_dict()) == {"w", "_folded_param0"}


def test_a_computed_constant_weight_folds():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3))
    folds(Chain(conv, nn.BatchNorm2d(6, eps=1e-3)), torch.randn(2, 3, 6, 6))


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, groups=2)], ids=["conv", "transposed"]
)
def test_core_aten_forms_fold(layer):
    """run_decompositions turns conv2d into convolution and batch_norm into one that returns three tensors."""
    x = torch.randn(2, 4, 6, 6)
    model = randomize(Chain(layer, nn.BatchNorm2d(6, eps=1e-3))).eval()
    gm = captured(torch.export.export(model, (x,)).run_decompositions())
    assert norms(gm) == []
    assert relative_error(gm(x), model(x)) < REASSOCIATION


def test_folding_in_half_precision_computes_in_float32():
    """Products and factors are rounded to float16 once, not at each step: at most 2**-11 for each of 27 products."""
    model = randomize(Chain(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, eps=1e-3))).eval()
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    gm = captured(torch.export.export(model.half(), (x.half(),)))
    assert {value.dtype for value in gm.state_dict().values()} == {torch.float16}
    assert relative_error(gm(x.half()).float(), expected) < 2**-11 * 4


# --- what stays, and why ----------------------------------------------------------------------------------------------


def test_two_batch_norms_on_one_convolution_stay():
    assert (
        stays(TwoNorms(), torch.randn(2, 3, 6, 6))
        == ["conv2d has 2 users, folding would change what the others see"] * 2
    )


def test_a_batch_norm_captured_in_training_mode_stays():
    exported = export(Chain(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)), torch.randn(2, 3, 6, 6), train=True)
    (reason,) = reasons(captured(exported))
    assert reason == (
        "captured in training mode, it normalizes with the batch's own statistics; call model.eval() before export"
    )


def test_a_decomposed_batch_norm_in_training_mode_stays():
    x = torch.randn(2, 3, 6, 6)
    exported = export(Chain(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)), x, train=True).run_decompositions()
    gm = captured(exported)
    assert len(norms(gm)) == 1


def test_a_batch_norm_without_running_statistics_stays():
    model = Chain(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, track_running_stats=False))
    assert stays(model, torch.randn(2, 3, 6, 6)) == ["it has no running statistics (track_running_stats=False)"]


def test_a_batch_norm_of_a_linear_on_three_dimensions_stays():
    model = Chain(nn.Linear(5, 4), nn.BatchNorm1d(3))
    assert stays(model, torch.randn(2, 3, 5)) == [
        "it normalizes dimension 1, which does not hold the channels of linear"
    ]


def test_a_batch_norm_of_a_convolution_without_a_batch_stays():
    """6 channels and 6 positions: the sizes fit, the dimensions do not."""
    model = Chain(nn.Conv1d(3, 6, 3, padding=1), nn.BatchNorm1d(6))
    assert stays(model, torch.randn(3, 6)) == ["it normalizes dimension 1, which does not hold the channels of conv1d"]


def test_a_batch_norm_behind_something_else_stays():
    assert stays(Chain(nn.ReLU(), nn.BatchNorm2d(3)), torch.randn(2, 3, 4, 4)) == [
        "its input is not computed by a convolution or linear"
    ]


class Computed(nn.Module):
    """A convolution whose weight is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return self.norm(F.conv1d(x, w))


def test_a_weight_known_only_at_run_time_keeps_the_batch_norm():
    assert stays(Computed(), torch.randn(2, 3, 8), torch.randn(4, 3, 3)) == ["w is not a constant of the model"]


# --- what else must hold ----------------------------------------------------------------------------------------------


def test_the_callers_model_keeps_its_parameters_and_its_graph():
    model = Chain(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    exported = export(model, torch.randn(2, 3, 6, 6)).module()
    before = dict(exported.named_parameters())
    values = {name: value.clone() for name, value in exported.state_dict().items()}
    code = exported.code
    origins = {node.name: list(node.meta.get("from_node", ())) for node in exported.graph.nodes}
    captured(exported)
    assert all(value is before[name] for name, value in exported.named_parameters())
    torch.testing.assert_close(exported.state_dict(), values, rtol=0, atol=0)
    assert exported.code == code
    assert {node.name: list(node.meta.get("from_node", ())) for node in exported.graph.nodes} == origins


def test_state_dict_keys_stay_where_there_was_a_parameter():
    gm = folds(Chain(nn.Conv2d(3, 6, 3, bias=True), nn.BatchNorm2d(6)), torch.randn(2, 3, 6, 6))
    assert sorted(gm.state_dict()) == ["layer.bias", "layer.weight"]


def test_the_report_lists_what_was_folded():
    gm = captured(Chain(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)), torch.randn(2, 3, 6, 6))
    assert list(map(str, explain(gm).record.folded)) == ["batch_norm into conv2d"]


def test_the_convolution_says_that_it_stems_from_the_batch_norm_too():
    gm = captured(Chain(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)), torch.randn(2, 3, 6, 6))
    (conv,) = calls(gm, aten.conv2d.default)
    assert (conv.meta["from_node"][-1].name, conv.meta["from_node"][-1].pass_name) == ("batch_norm", "fold_batch_norm")


def test_folded_weights_are_what_is_quantized():
    """By hand: w' = w * gamma / sqrt(var + eps), then 119 steps for the largest magnitude of each channel."""
    model = randomize(Chain(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, eps=1e-3))).eval()
    x = torch.randn(2, 3, 6, 6)
    prepared = prepare_pt2e(export(model, x), Toy(STATIC))
    prepared(x)
    converted = convert_pt2e(prepared)
    norm = model.norms[0]
    weight = model.layer.weight * (norm.weight / torch.sqrt(norm.running_var + 1e-3)).reshape(-1, 1, 1, 1)
    scale = weight.abs().amax((1, 2, 3), keepdim=True) / 119
    difference = converted._frozen_param0 - torch.round(weight / scale)
    assert difference.abs().max() <= 1  # a weight that lies between two steps, after a different order of float32 ops
    assert (difference != 0).float().mean() < 0.02
