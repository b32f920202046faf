"""Files that torch.ao wrote load without its classes: into ours, with the same numbers."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

from pt2e_quant.compat import install, load_file, uninstall
from pt2e_quant.errors import FileError
from pt2e_quant.nn import quantized
from pt2e_quant.qtensor import QTensor
from tests.nn.cases import DYNAMIC, MODULES, ours, theirs

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's types and modules are deprecated

CASES = {**MODULES, **DYNAMIC}


def saved(value: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def codes(y: torch.Tensor) -> torch.Tensor:
    return y.int_repr() if isinstance(y, QTensor) else y


@pytest.fixture(scope="module", autouse=True)
def engine() -> None:
    torch.backends.quantized.engine = "x86"


@pytest.mark.parametrize("name", CASES)
def test_a_whole_module_becomes_ours(name):
    our, arguments = CASES[name](ours())
    their, _ = CASES[name](theirs())
    loaded = load_file(saved(their))
    assert type(loaded) is type(our)
    assert torch.equal(codes(loaded(*arguments)), codes(our(*arguments)))


RECURRENT = {
    "LSTM": nn.LSTM(8, 6, 2, bidirectional=True),
    "GRU": nn.GRU(8, 6),
    "LSTMCell": nn.LSTMCell(8, 6),
    "GRUCell": nn.GRUCell(8, 6),
    "RNNCell": nn.RNNCell(8, 6, nonlinearity="relu"),
}


def quantized_by_torch(name: str, dtype: torch.dtype = torch.qint8) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(RECURRENT[name]).eval(), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_load_whole_and_as_state_dicts(name, dtype):
    """Their weights are script objects of C++ classes, which weights_only=True refuses by itself."""
    theirs = quantized_by_torch(name, dtype)
    whole = load_file(saved(theirs))
    blank = getattr(quantized.dynamic, name).empty_like(RECURRENT[name], dtype)
    blank.load_state_dict(torch.load(saved(theirs[0].state_dict()), weights_only=True))
    x = torch.randn(8) if "Cell" in name else torch.randn(5, 2, 8)
    for one, other in zip(flat(whole(x)), flat(blank(x)), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(flat(whole(x)), flat(RECURRENT[name](x)), strict=True):
        assert (one - other).abs().max() < 0.05  # 8 bits of weights in [-0.41, 0.41], of inputs in [-4, 4]


def flat(value: Any) -> list[torch.Tensor]:
    return list(torch.utils._pytree.tree_leaves(value))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant = torch.ao.quantization.QuantStub()
        self.conv, self.relu, self.fc = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 2)
        self.dequant = torch.ao.quantization.DeQuantStub()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.conv(self.quant(x))).mean((2, 3))
        return self.dequant(self.fc(y))


@pytest.fixture(scope="module")
def model() -> tuple[nn.Module, torch.Tensor]:
    q = torch.ao.quantization
    torch.manual_seed(0)
    x, net = torch.randn(2, 3, 8, 8), q.fuse_modules(Net().eval(), [["conv", "relu"]])
    net.qconfig = q.get_default_qconfig("x86")
    prepared = q.prepare(net)
    prepared(x)
    return q.convert(prepared), x


def test_a_converted_model_computes_the_same(model):
    converted, x = model
    loaded = load_file(saved(converted), classes=[Net])
    assert type(loaded.conv).__module__.startswith("pt2e_quant")
    step = converted.fc.scale
    assert (loaded(x) - converted(x)).abs().max() <= step * 1.001  # the two round a mean between codes differently


def test_a_class_that_nobody_named_is_an_error(model):
    with pytest.raises(
        FileError, match=r"an object of \S*Net; if that is a class of the program, name it with classes"
    ):
        load_file(saved(model[0]))


def test_a_file_that_is_not_there_or_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(FileError, match="cannot read"):
        load_file(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(FileError, match="cannot load"):
        load_file(tmp_path / "text.pt")


def test_torch_load_gives_ours_while_the_old_roots_are_ours(model):
    converted, _ = model
    file = saved([converted.conv, converted.fc])
    install()
    try:
        conv, fc = torch.load(file, weights_only=False)
    finally:
        uninstall()
    assert isinstance(fc, quantized.Linear)
    assert conv.product.quantized.q_per_channel_axis() == 0
