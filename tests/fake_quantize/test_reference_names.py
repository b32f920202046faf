"""Every name that the reference lists for fake quantizers, qconfigs and mappings exists here, and does its work."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from pt2e_quant.fake_quantize import FakeQuantizeBase
from pt2e_quant.observer import FixedQParamsObserver, ObserverBase
from pt2e_quant.qconfig import QConfig

REFERENCE_API = json.loads((Path(__file__).parents[1] / "reference_api.json").read_text(encoding="utf-8"))["names"]
LISTED = [
    (module, name)
    for module in ("fake_quantize", "qconfig", "qconfig_mapping")
    for name in REFERENCE_API[f"torch.ao.quantization.{module}"]
]


def test_the_list_is_that_of_the_reference():
    assert len(LISTED) == 15 + 13 + 3


@pytest.mark.parametrize(("module", "name"), LISTED, ids=[name for _, name in LISTED])
def test_a_listed_name_works(module, name):
    drive = DRIVERS.get(name)
    thing = getattr(importlib.import_module(f"pt2e_quant.{module}"), name)
    if drive is not None:
        drive(thing)
    elif module == "qconfig":
        for recipe in thing:
            run(recipe())
    else:
        run(thing())


def run(module: nn.Module) -> None:
    """It takes a tensor and gives one of its shape: rounded by a fake quantizer, the same object by an observer."""
    x = torch.linspace(-1.7, 2.2, 24).reshape(4, 6)
    out = module(x)
    if isinstance(module, FakeQuantizeBase):
        assert not torch.equal(out, x)
        module.disable_observer()
        assert torch.equal(module(out), out)  # on a grid already
    else:
        assert isinstance(module, (ObserverBase, nn.Identity))
        assert out is x


def base(kind: type) -> None:
    class Halves(kind):
        def forward(self, x):
            return torch.round(x * 2) / 2 if self.fake_quant_enabled[0] else x

        def calculate_qparams(self):
            return torch.tensor([0.5]), torch.tensor([0])

    module = Halves.with_args()()
    assert module(torch.tensor([0.6])).item() == 0.5
    module.disable_fake_quant()
    assert module(torch.tensor([0.6])).item() == pytest.approx(0.6)
    with pytest.raises(TypeError, match="abstract"):
        kind()


def fixed(kind: type) -> None:
    module = kind.with_args(observer=FixedQParamsObserver.with_args(scale=0.25, zero_point=3))()
    assert module(torch.tensor([0.3, -9.0])).tolist() == [0.25, -0.75]


def switch(flag: str, value: int):
    def drive(function):
        from pt2e_quant.fake_quantize import FakeQuantize

        model = nn.Sequential(FakeQuantize(), nn.Linear(1, 1), FakeQuantize())
        for module in (model[0], model[2]):
            getattr(module, flag)[0] = 1 - value
        model.apply(function)
        assert [getattr(module, flag).item() for module in (model[0], model[2])] == [value, value]

    return drive


def mapping(function) -> None:
    found = function("qnnpack")
    assert isinstance(found.qconfig_for("any.path", nn.Linear), QConfig)
    run(found.qconfig_for("any.path", nn.Conv2d).activation())


def by_hand(kind: type) -> None:
    config = QConfig(nn.Identity, nn.Identity)
    assert kind().set_object_type(nn.Linear, config).qconfig_for("a", nn.Linear) is config


DRIVERS = {
    "FakeQuantizeBase": base,
    "FixedQParamsFakeQuantize": fixed,
    "disable_fake_quant": switch("fake_quant_enabled", 0),
    "enable_fake_quant": switch("fake_quant_enabled", 1),
    "disable_observer": switch("observer_enabled", 0),
    "enable_observer": switch("observer_enabled", 1),
    "QConfig": lambda kind: run(kind(nn.Identity, nn.Identity).weight()),
    "QConfigMapping": by_hand,
    "get_default_qconfig_mapping": mapping,
    "get_default_qat_qconfig_mapping": mapping,
}
