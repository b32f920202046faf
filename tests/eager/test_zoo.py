"""Small forms of torchvision's quantizable nets, beside torch.ao's on the same weights."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from pt2e_quant.eager import DeQuantStub, QuantStub, convert, fuse_modules, fuse_modules_qat, prepare, prepare_qat
from pt2e_quant.eager.chains import find_chains
from pt2e_quant.eager.fuse import is_known
from pt2e_quant.nn.quantized import FloatFunctional
from pt2e_quant.qconfig import get_default_qat_qconfig, get_default_qconfig
from pt2e_quant.qtensor import from_torch
from pt2e_quant.sqnr import sqnr
from tests.eager.zoo import NETS, make

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
QUICK = "mobilenet_v3"
NAMES = [pytest.param(name, marks=() if name == QUICK else pytest.mark.slow) for name in NETS]
pytestmark = pytest.mark.filterwarnings("ignore")  # torch's modules and types are deprecated


def ours(name: str) -> Any:
    return make(name, QuantStub, DeQuantStub, FloatFunctional)


def theirs(name: str) -> Any:
    import torch.ao.quantization as peer

    torch.backends.quantized.engine = "x86"
    return make(name, peer.QuantStub, peer.DeQuantStub, torch.ao.nn.quantized.FloatFunctional)


def rows(model: nn.Module, is_qat: bool) -> list[list[str]]:
    return find_chains(model, (X,), lambda modules: is_known(modules, is_qat))


def layers(model: nn.Module, x: torch.Tensor) -> dict[str, tuple[Any, Any]]:
    """By name, what each quantized module of the peer's takes and returns."""
    seen: dict[str, tuple[Any, Any]] = {}

    def keep(name: str, inputs: Any, output: Any) -> None:
        seen[name] = inputs[0], output

    for name, module in model.named_modules():
        if hasattr(module, "scale"):
            module.register_forward_hook(lambda module, i, o, name=name: keep(name, i, o))
    model(x)
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_each_layer_is_within_a_step_of_the_peers_and_the_net_near_the_float_one(name: str) -> None:
    import torch.ao.quantization as peer

    model, other = ours(name).eval(), theirs(name).eval()
    chains = rows(model, False)
    model, other = fuse_modules(model, chains), peer.fuse_modules(other, chains)
    model.qconfig, other.qconfig = get_default_qconfig("onednn"), peer.get_default_qconfig("onednn")
    prepared, twin = prepare(model), peer.prepare(other)
    prepared(X), twin(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        made: Any = convert(prepared)
    wanted = peer.convert(twin)
    modules, compared = dict(made.named_modules()), 0
    for path, (x, y) in layers(wanted, X).items():
        if not x.is_quantized:
            continue
        codes = modules[path](from_torch(x)).int_repr().int() - y.int_repr().int()
        assert int(codes.abs().max()) <= 1, path
        compared += 1
    assert compared > 5
    assert sqnr(model(X), made(X)) > min(30.0, sqnr(model(X), wanted(X)) - 0.5)


def in_training(package: str, name: str) -> Any:
    """A net of one package, prepared."""
    import torch.ao.quantization as peer

    chains = rows(ours(name), True)
    if package == "ours":
        model: Any = fuse_modules_qat(ours(name), chains)
        model.qconfig = get_default_qat_qconfig("x86")
        return prepare_qat(model)
    model = peer.fuse_modules_qat(theirs(name), chains)
    model.qconfig = peer.get_default_qat_qconfig("x86")
    return peer.prepare_qat(model)


@pytest.mark.parametrize("name", [pytest.param("resnet18", marks=pytest.mark.slow), "googlenet"])
def test_losses_of_twenty_steps_are_the_peers_to_the_bit(name: str) -> None:
    """The same operators in the same order: anything else drifts by 1e-2, as torch.ao's do from weights 1e-7 apart."""
    assert train(in_training("ours", name)) == train(in_training("peer", name))


def train(model: nn.Module) -> list[float]:
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.01), []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(X), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
