"""What the first calibration run shows: where the converted model would stop, and that nothing else is said."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pt2e_quant.eager import DeQuantStub, Meeting, QuantStub, convert, prepare, prepare_qat, swap_report
from pt2e_quant.errors import ConversionWarning, QuantizedTensorError
from pt2e_quant.nn.quantized import FloatFunctional
from pt2e_quant.qconfig import default_qat_qconfig, default_qconfig

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.conv1, self.conv2, self.act = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.ReLU()
        self.qconfig = default_qconfig


class Sum(Residual):
    def forward(self, x: Tensor) -> Any:
        x = self.act(self.conv1(self.quant(x)))
        y = self.conv2(x)
        return self.dequant(y + x)


class NoStub(Residual):
    def __init__(self) -> None:
        super().__init__()
        del self.quant

    def forward(self, x: Tensor) -> Any:
        return self.dequant(self.conv2(self.act(self.conv1(x))))


class Unfused(Residual):
    def __init__(self) -> None:
        super().__init__()
        del self.conv2
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Any:
        return self.dequant(self.norm(self.conv1(self.quant(x)).flatten(2)))


class Sound(Residual):
    """Moves, pools, a functional, an input that is read in float too, two dequantized outputs."""

    def __init__(self) -> None:
        super().__init__()
        del self.conv2
        self.sum, self.drop, self.pool = FloatFunctional(), nn.Dropout(), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Any:
        y = self.quant(x)
        y = self.sum.add(self.conv1(y), self.drop(y))
        y = torch.cat([y, y], 1).chunk(2, 1)[0].relu()
        y = self.pool(y.permute(0, 1, 3, 2)) if y.shape[0] > 1 else y
        wanted = self.dequant(y)
        return wanted * 2 + x.mean(), self.dequant(y.mean((2, 3))).sum()


def found(model: nn.Module) -> tuple[Any, tuple[Meeting, ...]]:
    prepared = prepare(model.eval())
    prepared(X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConversionWarning)
        made = convert(prepared)
    return made, swap_report(made).meetings or ()


@pytest.mark.parametrize(
    ("kind", "name", "what"),
    [
        (Sum, "", ["aten.add.Tensor has no form", "return self.dequant(y + x)", "FloatFunctional().add(...)"]),
        (NoStub, "conv1", ["Conv2d takes a quantized tensor, and gets a float one", "self.conv1(x)", "QuantStub"]),
        (Unfused, "norm", ["batch_norm", "return self.dequant(self.norm(", "(fuse_modules)"]),
    ],
)
def test_a_meeting_has_a_module_a_line_and_a_way_out_and_is_where_the_model_stops(
    kind: Any, name: str, what: list[str]
) -> None:
    made, meetings = found(kind())
    assert [one.name for one in meetings] == [name]
    assert [part for part in what if part not in meetings[0].what] == []
    with pytest.raises(QuantizedTensorError):
        made(X)


def test_a_model_that_runs_has_none() -> None:
    made, meetings = found(Sound())
    assert meetings == ()
    wanted = Sound.forward.__get__(made)(X)
    assert torch.equal(made(X)[0], wanted[0])


def test_convert_warns_at_the_line_that_called_it() -> None:
    prepared = prepare(Sum().eval())
    prepared(X)
    with pytest.warns(ConversionWarning, match="Sum will stop where float and quantized tensors meet") as caught:
        convert(prepared)
    assert caught[0].filename == __file__


def test_the_first_run_alone_is_looked_at_and_changes_nothing() -> None:
    model = Sum().eval()
    prepared: Any = prepare(model)
    assert torch.equal(prepared(X), model(X))
    hooks = {name: len(module._forward_hooks) for name, module in prepared.named_modules()}
    prepared(X)
    assert hooks == {name: len(module._forward_hooks) for name, module in prepared.named_modules()}
    assert hooks["act"] == 0


def test_what_was_found_goes_along_with_copies_and_files() -> None:
    prepared = prepare(Sum().eval())
    prepared(X)
    for other in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        with pytest.warns(ConversionWarning):
            convert(other)
    torch.save(prepared.state_dict(), io.BytesIO())


def test_a_run_that_fails_is_not_the_first() -> None:
    prepared = prepare(Sum().eval())
    with pytest.raises(RuntimeError):
        prepared(X[:, :2])
    prepared(X)
    with pytest.warns(ConversionWarning):
        convert(prepared)


def test_training_is_looked_at_too() -> None:
    model = Sum().train()
    model.qconfig = default_qat_qconfig
    prepared: Any = prepare_qat(model)
    prepared(X).sum().backward()
    assert prepared.conv1.weight.grad is not None
    with pytest.warns(ConversionWarning, match=r"FloatFunctional\(\)\.add"):
        convert(prepared.eval())


def test_other_mappings_are_not_judged_by_it() -> None:
    prepared = prepare(Sum().eval())
    prepared(X)
    assert swap_report(convert(prepared, is_reference=True)).meetings is None


class WithDevice(Residual):
    """A mode that the model enters between layers."""

    def forward(self, x: Tensor) -> Any:
        x = self.quant(x)
        with torch.device("meta"):
            x = self.act(self.conv1(x))
            self.made = torch.empty(1)
        return self.dequant(x)


def test_modes_of_the_model_stay() -> None:
    prepared: Any = prepare(WithDevice().eval())
    prepared(X)
    assert prepared.made.is_meta
    assert torch.empty(1).device.type == "cpu"
