"""Every name that the reference lists under torch.ao.quantization.observer exists here and does what it does there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from observer_data import torch_ao
from torch import nn

import pt2e_quant.observer as ours
from pt2e_quant.errors import CalibrationError

REFERENCE_API = json.loads((Path(__file__).parents[1] / "reference_api.json").read_text(encoding="utf-8"))
NAMES: list[str] = REFERENCE_API["names"]["torch.ao.quantization.observer"]
BEYOND_THE_LIST = [name for name in torch_ao.__all__ if name.startswith(("default_", "per_channel_", "weight_"))]

X = torch.tensor([[-1.75, 0.5, 3.25], [0.0, -0.375, 1.0]])


class Observed(nn.Module):
    def __init__(self, module: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.activation_post_process_0 = module.MinMaxObserver(dtype=torch.qint8)
        self.block = nn.Module()
        self.block.activation_post_process_1 = module.PerChannelMinMaxObserver(ch_axis=1)
        self.block.activation_post_process_2 = module.HistogramObserver(bins=64)

    def watched(self) -> Observed:
        for observer in (self.activation_post_process_0, *self.block.children()):
            observer(X)
        return self


def check_base(name: str) -> None:
    class Mine(getattr(ours, name)):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

        def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.ones(1), torch.zeros(1)

    with pytest.raises(TypeError, match="abstract"):
        getattr(ours, name)(dtype=torch.int8)
    assert Mine.with_args(dtype=torch.int8)().dtype is torch.int8
    assert Mine.with_callable_args(dtype=lambda: torch.uint8)().dtype is torch.uint8


def check_observer(name: str) -> None:
    """The same arguments, attributes, state and qparams, or the absence of qparams; checkpoints load both ways."""
    mine, theirs = getattr(ours, name)(), getattr(torch_ao, name)()
    assert mine(X) is X
    theirs(X)
    assert {key: getattr(mine, key, None) for key in ATTRIBUTES} == {k: getattr(theirs, k, None) for k in ATTRIBUTES}
    fresh = getattr(ours, name)(), getattr(torch_ao, name)()
    fresh[0].load_state_dict(theirs.state_dict(), strict=True)
    fresh[1].load_state_dict(mine.state_dict(), strict=True)
    if any(part in name.lower() for part in ("placeholder", "debug", "recording", "noop", "dynamic", "reuse")):
        with pytest.raises(CalibrationError, match="has no qparams"):
            mine.calculate_qparams()
        return
    expected = [end.tolist() for end in theirs.calculate_qparams()]
    for observer in (mine, *fresh):
        assert [end.tolist() for end in observer.calculate_qparams()] == expected


ATTRIBUTES = ("dtype", "qscheme", "quant_min", "quant_max", "is_dynamic", "ch_axis", "custom_op", "averaging_constant")


def check_state(_: str) -> None:
    mine, theirs = Observed(ours).watched(), Observed(torch_ao).watched()
    state, expected = ours.get_observer_state_dict(mine), torch_ao.get_observer_state_dict(theirs)
    assert {key: value.tolist() for key, value in state.items()} == {k: v.tolist() for k, v in expected.items()}
    for source in (state, expected):
        target = Observed(ours)
        weight = target.conv.weight.clone()
        ours.load_observer_state_dict(target, source)
        torch_target = Observed(torch_ao)
        torch_ao.load_observer_state_dict(torch_target, source)
        for loaded in (target, torch_target):
            loaded = torch_ao.get_observer_state_dict(loaded)
            assert {key: value.tolist() for key, value in loaded.items()} == {k: v.tolist() for k, v in state.items()}
        assert torch.equal(target.conv.weight, weight)


def driver(name: str):
    if "state_dict" in name:
        return check_state
    return check_base if name.endswith("ObserverBase") else check_observer


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_the_reference_does_the_same_here(name):
    assert name in ours.__all__
    driver(name)(name)


@pytest.mark.parametrize("name", BEYOND_THE_LIST)
def test_recipes_that_the_reference_has_but_does_not_list_are_here_too(name):
    assert name in ours.__all__
    if "fixed_qparams" in name:
        mine, theirs = getattr(ours, name)(), getattr(torch_ao, name)()
        assert [end.tolist() for end in mine.calculate_qparams()] == [e.tolist() for e in theirs.calculate_qparams()]
        assert (mine.quant_min, mine.quant_max, mine.dtype) == (theirs.quant_min, theirs.quant_max, theirs.dtype)
    else:
        check_observer(name)


def test_there_are_19_names():
    assert len(NAMES) == 19


def test_a_recording_observer_keeps_copies_in_order():
    observer = ours.RecordingObserver()
    x = X.clone().requires_grad_()
    observer(x)
    with torch.no_grad():
        x.mul_(2)
    observer(x)
    assert [value.tolist() for value in observer.get_tensor_value()] == [X.tolist(), (X * 2).tolist()]
    assert not any(value.requires_grad for value in observer.tensor_val)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("block.activation_post_process_1.max_val"),
            r"missing: block.activation_post_process_1.max_val",
        ),
        (
            lambda s: s.update({"activation_post_process_9.eps": torch.ones(1)}),
            r"without an observer here: act.*_9\.eps",
        ),
        (lambda s: s.update({"activation_post_process_0.extra": torch.ones(1)}), r"observer here: act.*_0\.extra"),
        (lambda s: s.update({"activation_post_process_0.eps": torch.ones(3)}), r"size mismatch for .*_0\.eps"),
    ],
    ids=["missing", "no observer", "no buffer", "shape"],
)
def test_a_state_that_does_not_fit_is_refused_with_the_keys(change, message):
    state = ours.get_observer_state_dict(Observed(ours).watched())
    change(state)
    with pytest.raises(CalibrationError, match=message):
        ours.load_observer_state_dict(Observed(ours), state)
