"""train() and eval() switch dropout and batch norm of prepared and converted models, and nothing else."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pt2e_quant import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from pt2e_quant.arguments import bind
from pt2e_quant.errors import CaptureWarning
from tests.nets import export
from tests.pt2e.kit import STATIC, Nothing, Toy, calls, the_call
from tests.qat.kit import TRAINED

aten = torch.ops.aten

P, EPS, MOMENTUM = 0.15, 1e-3, 0.03  # nobody's defaults


class Net(nn.Module):
    """A batch norm that nothing folds, dropout, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6, eps=EPS, momentum=MOMENTUM)
        self.dropout = nn.Dropout(P)
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.dropout(self.norm(x)))


def prepared() -> GraphModule:
    return prepare_pt2e(export(Net(), torch.randn(8, 6)), Toy(STATIC))


def converted() -> GraphModule:
    gm = prepared()
    gm(torch.randn(8, 6))
    return convert_pt2e(gm)


BOTH = pytest.mark.parametrize("make", [prepared, converted], ids=["prepared", "converted"])


def literals(gm: GraphModule) -> list[tuple[object, ...]]:
    """(training, momentum, eps) of the batch norm, (p, train) of the dropout."""
    return [the_call(gm, aten.batch_norm.default).args[5:8], the_call(gm, aten.dropout.default).args[1:]]


@BOTH
def test_literals_keep_their_values_through_both_modes(make: Callable[[], GraphModule]):
    """Users' item 5: eval -> train -> eval leaves eps, momentum and p bit-identical."""
    gm = make()
    assert literals(gm) == [(False, MOMENTUM, EPS), (P, False)]
    gm.train()
    assert literals(gm) == [(True, MOMENTUM, EPS), (P, True)]
    gm.eval()
    assert literals(gm) == [(False, MOMENTUM, EPS), (P, False)]


@BOTH
def test_train_and_eval_return_the_module_and_set_its_flag(make: Callable[[], GraphModule]):
    gm = make()
    assert not gm.training
    assert gm.train() is gm
    assert gm.training
    assert gm.eval() is gm
    assert not gm.training


@BOTH
def test_a_mode_that_is_set_already_recompiles_nothing(make: Callable[[], GraphModule], monkeypatch):
    gm = make()
    count: list[int] = []
    recompile = type(gm).recompile
    monkeypatch.setattr(type(gm), "recompile", lambda self: count.append(1) or recompile(self))
    gm.eval().eval()
    assert count == []
    gm.train().train()
    assert count == [1]


def test_a_model_captured_in_training_mode_says_so():
    with pytest.warns(CaptureWarning, match=r"exported in training mode:\nnode \w+ = aten\.\w+") as caught:
        gm = prepare_pt2e(export(Net(), torch.randn(8, 6), train=True), Toy(STATIC))
    assert caught[0].filename == __file__
    assert gm.training
    assert literals(gm.eval()) == [(False, MOMENTUM, EPS), (P, False)]


@pytest.mark.parametrize("captured_in", ["train", "eval"])
def test_an_unquantized_model_computes_what_the_eager_one_does_in_both_modes(captured_in):
    """Users' item 5: outputs equal those of the eager module in both modes.

    Dropout draws the same random numbers from the same seed; running statistics move alike.
    """
    torch.manual_seed(0)
    model, x = Net(), torch.randn(8, 6)
    exported = export(model, x, train=captured_in == "train")
    gm = prepare_pt2e(exported, Nothing(), allow_empty=True)
    eager = Net()
    eager.load_state_dict(model.state_dict())
    for mode in (False, True, False, True):
        outputs = []
        for module in (gm.train(mode), eager.train(mode)):
            torch.manual_seed(5)
            outputs.append(module(x))
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gm.get_buffer("norm.running_mean"), eager.norm.running_mean)
    torch.testing.assert_close(gm.get_buffer("norm.running_var"), eager.norm.running_var)


@pytest.mark.parametrize("train", [True, False])
def test_an_instance_norm_with_running_statistics_follows_the_mode(train):
    torch.manual_seed(0)
    model, x = nn.InstanceNorm1d(6, momentum=MOMENTUM, track_running_stats=True), torch.randn(8, 6, 5) + 2
    gm = prepare_qat_pt2e(export(model, x, train=train), Nothing(), allow_empty=True)
    assert gm.training is train
    for mode in (True, False, True, False):
        torch.testing.assert_close(gm.train(mode)(x), model.train(mode)(x))
    torch.testing.assert_close(gm.get_buffer("running_mean"), model.running_mean)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(6, track_running_stats=False), nn.InstanceNorm1d(6)])
def test_a_norm_that_has_no_running_statistics_tells_of_no_mode(norm, recwarn):
    gm = prepare_pt2e(export(norm, torch.randn(8, 6, 5)), Nothing(), allow_empty=True)
    assert not gm.training
    assert [str(one.message) for one in recwarn if one.category is CaptureWarning] == []


def test_a_converted_model_drops_out_in_training_mode_only():
    torch.manual_seed(0)
    gm, x = converted(), torch.randn(8, 6)
    assert torch.equal(gm(x), gm(x))
    gm.train()
    assert not torch.equal(gm(x), gm(x))
    gm.eval()
    assert torch.equal(gm(x), gm(x))


def test_a_folded_batch_norm_does_not_come_back():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    gm = prepare_pt2e(export(model, torch.randn(2, 3, 6, 6)), Toy(STATIC)).train()
    assert calls(gm, aten.batch_norm.default) == []


# --- dropout without a switch -----------------------------------------------------------------------------------------

ROWS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """torch's layers hand their dropout to the kernel of attention in training alone, without a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=P, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def attention_in(train: bool, **kwargs: object) -> GraphModule:
    return prepare_qat_pt2e(export(Attention(), ROWS, train=train), Toy(TRAINED), **kwargs)


def draws(gm: GraphModule) -> bool:
    return not torch.equal(gm(ROWS), gm(ROWS))


def test_attention_that_was_captured_in_training_drops_in_training_alone():
    gm = attention_in(train=True)
    attention = the_call(gm, aten.scaled_dot_product_attention.default)
    for mode, expected in ((False, 0.0), (True, P), (False, 0.0), (True, P)):
        gm.train(mode)
        assert bind(attention)["dropout_p"] == expected
    gm(ROWS)
    assert not draws(convert_pt2e(gm.eval()))


def test_copies_and_pickles_know_what_attention_drops_in_training():
    gm = attention_in(train=True).eval()
    for twin in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert bind(the_call(twin.train(), aten.scaled_dot_product_attention.default))["dropout_p"] == P


def test_a_model_whose_attention_alone_drops_is_in_the_mode_of_its_export():
    assert attention_in(True).training
    with pytest.warns(CaptureWarning, match="dropout of 1 nn.MultiheadAttention"):
        assert not attention_in(False).training
    with pytest.warns(CaptureWarning, match="scaled_dot_product_attention"):
        prepare_pt2e(export(Attention(), ROWS, train=True), Toy(STATIC))


def test_decomposed_attention_drops_in_training():
    gm = attention_in(train=True, decompose={"sdpa"})
    assert the_call(gm, aten.dropout.default).args[1:] == (P, True)
    assert the_call(gm.eval(), aten.dropout.default).args[1:] == (P, False)
