"""fuse_modules beside torch.ao's and the float model; rows found by one call; containers and stubs."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pt2e_quant.eager import QuantStub, QuantWrapper, add_quant_dequant, fuse_modules, fuse_modules_qat
from pt2e_quant.errors import ConversionError, TargetingError
from pt2e_quant.nn import intrinsic
from pt2e_quant.qconfig import default_qconfig


class Block(nn.Module):
    """A residual block whose first ReLU is in place, and whose second convolution is read twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.conv2, self.relu2 = nn.Conv2d(4, 4, 1), nn.ReLU()
        self.up, self.bn2 = nn.ConvTranspose2d(4, 2, 2), nn.BatchNorm2d(2)
        self.last = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        for norm in (self.bn1, self.bn2):
            nn.init.uniform_(norm.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        z = self.conv2(y)
        return self.last(self.bn2(self.up(self.relu2(z) + z)).mean((2, 3)))  # type: ignore[no-any-return]


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
ROWS = [["conv1", "bn1", "relu1"], ["up", "bn2"], ["last.0", "last.1"]]


def classes(model: nn.Module) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in model.named_modules()}


@pytest.mark.parametrize("is_qat", [False, True])
def test_the_same_classes_and_numbers_as_the_peers(is_qat: bool) -> None:
    from torch.ao.quantization import fuse_modules as theirs
    from torch.ao.quantization import fuse_modules_qat as theirs_qat

    rows = [ROWS[0], ROWS[2]] if is_qat else ROWS  # transposed convolutions do not train with their batch norm
    model = Block().train(is_qat)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's modules are deprecated
        wanted = (theirs_qat if is_qat else theirs)(model, rows)
    made = (fuse_modules_qat if is_qat else fuse_modules)(model, rows)
    assert classes(made) == classes(wanted)
    assert torch.equal(made.eval()(X), wanted.eval()(X))
    assert torch.allclose(made(X), model.eval()(X), atol=1e-5)  # float32, batch norm in the weights


def test_one_call_finds_the_rows_and_leaves_what_others_read() -> None:
    model = Block().eval()
    found, listed = fuse_modules(model, example_inputs=(X,)), fuse_modules(model, ROWS)
    assert classes(found) == classes(listed)
    assert type(found.conv2) is nn.Conv2d  # relu2 is not its only reader
    assert torch.equal(found(X), listed(X))


def test_finding_in_training_leaves_statistics_alone() -> None:
    model = Block()
    before = model.bn1.running_mean.clone()  # type: ignore[union-attr]
    made: Any = fuse_modules_qat(model, example_inputs=(X,), inplace=True)
    assert made is model
    assert isinstance(made.conv1, intrinsic.ConvBnReLU2d)
    assert torch.equal(made.conv1[1].running_mean, before)


def test_a_module_that_runs_twice_is_not_fused() -> None:
    conv, relu = nn.Conv2d(3, 3, 1), nn.ReLU()
    model = nn.Sequential(conv, relu, conv, relu).eval()
    assert classes(fuse_modules(model, example_inputs=(X,))) == classes(model)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (["conv1", "bn"], TargetingError, r"no module 'bn'. Did you mean 'bn2' or 'bn1'"),
        (
            ["bn1", "conv1"],
            ConversionError,
            r"\['BatchNorm2d', 'Conv2d'\] are not known to fuse. Give them in",
        ),
        ([1, 2], ConversionError, "modules_to_fuse must be"),
        ([["conv1", 1]], ConversionError, "modules_to_fuse must be"),
        (None, ConversionError, "pass a list of paths, or example_inputs"),
    ],
)
def test_what_cannot_be_fused_is_said(rows: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fuse_modules(Block().eval(), rows)


def test_a_model_in_training_is_refused() -> None:
    with pytest.raises(ConversionError, match=r"call model\.eval"):
        fuse_modules(Block(), ROWS)


def test_hooks_go_along() -> None:
    model, seen = Block().eval(), list[str]()
    model.conv1.register_forward_pre_hook(lambda *_: seen.append("before"))
    model.relu1.register_forward_hook(lambda *_: seen.append("after"))
    fuse_modules(model, ROWS)(X)
    assert seen == ["before", "after"]


def test_a_container_takes_its_own_parts_alone() -> None:
    with pytest.raises(ConversionError, match=r"ConvReLU2d holds \['Conv2d', 'ReLU'\] in this order"):
        intrinsic.ConvReLU2d(nn.ReLU(), nn.Conv2d(1, 1, 1))


def test_wrapping_puts_stubs_around_leaves_with_a_qconfig() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    model[0].qconfig = default_qconfig
    made: Any = add_quant_dequant(model)
    assert [type(module) for module in made] == [QuantWrapper, nn.ReLU]
    assert isinstance(made[0].quant, QuantStub)
    assert made[0].quant.qconfig is default_qconfig
    assert torch.equal(made(torch.ones(1, 3)), made[1](made[0].module(torch.ones(1, 3))))
