"""Fake quantizers against torch.ao, the peer: same outputs, qparams, gradients; checkpoints travel both ways."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor

import pt2e_quant.fake_quantize as ours
import pt2e_quant.observer as our_observers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it warns on import; here it is the oracle
    import torch.ao.quantization.fake_quantize as theirs
    import torch.ao.quantization.observer as their_observers
    from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*reduce_range"),  # of the peer
    pytest.mark.filterwarnings("ignore:must run observer before calling calculate_qparams"),
]

RECIPES = [name for name in ours.__all__ if name.startswith(("default_", "fused_")) and hasattr(theirs, name)]
FUSED = [name for name in RECIPES if "fused" in name]
HAND_MADE = {
    "int4 per tensor": ("MovingAverageMinMaxObserver", {"dtype": torch.qint8, "quant_min": -8, "quant_max": 7}),
    "symmetric uint8": ("MinMaxObserver", {"dtype": torch.quint8, "qscheme": torch.per_tensor_symmetric}),
    "channels of dim 1": (
        "PerChannelMinMaxObserver",
        {"dtype": torch.qint8, "qscheme": torch.per_channel_affine, "ch_axis": 1, "eps": 2**-9},
    ),
    "averages of dim 2": (
        "MovingAveragePerChannelMinMaxObserver",
        {"dtype": torch.quint8, "ch_axis": 2, "averaging_constant": 0.3, "quant_min": 0, "quant_max": 200},
    ),
}


def batches(*scales: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(6, 5, 4, generator=generator) * scale + 0.3 for scale in scales]


def run(module: torch.nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and the gradient of a loss that weighs every element differently."""
    x = x.clone().requires_grad_()
    out = module(x)
    (out * torch.linspace(-1, 2, out.numel()).reshape(out.shape)).sum().backward()
    return out.detach(), x.grad


def check(mine: torch.nn.Module, peer: torch.nn.Module, data: list[Tensor]) -> None:
    for x in data:
        for got, expected in zip(run(mine, x), run(peer, x), strict=True):
            assert torch.equal(got, expected)
        state = peer.state_dict()
        assert mine.state_dict().keys() == state.keys()
        for key, tensor in mine.state_dict().items():
            assert (key, tensor.dtype, tensor.tolist()) == (key, state[key].dtype, state[key].tolist())


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_of_the_reference_rounds_as_there(name):
    check(getattr(ours, name)(), getattr(theirs, name)(), batches(1.0, 4.0, 0.5))


@pytest.mark.parametrize("kind", HAND_MADE)
def test_any_observer_rounds_as_in_the_reference(kind):
    observer, arguments = HAND_MADE[kind]
    mine = ours.FakeQuantize(getattr(our_observers, observer), **arguments)
    check(mine, theirs.FakeQuantize(getattr(their_observers, observer), **arguments), batches(1.0, 3.0, 0.2))


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in FUSED])
def test_qparams_for_convert_are_those_of_the_reference(name):
    mine, peer = getattr(ours, name)(), getattr(theirs, name)()
    for module in (mine, peer):
        for x in batches(1.0, 4.0):
            module(x)
    for got, expected in zip(mine.calculate_qparams(), peer.calculate_qparams(), strict=True):
        assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("switch", ["disable_observer", "disable_fake_quant"])
@pytest.mark.parametrize("name", ["default_fake_quant", "default_per_channel_weight_fake_quant", *FUSED])
def test_switches_do_what_they_do_in_the_reference(name, switch):
    mine, peer = getattr(ours, name)(), getattr(theirs, name)()
    check(mine, peer, batches(1.0, 2.0))
    for module, package in ((mine, ours), (peer, theirs)):
        torch.nn.Sequential(module).apply(getattr(package, switch))
    check(mine, peer, batches(9.0, 0.1))


@pytest.mark.parametrize("name", RECIPES)
def test_checkpoints_travel_both_ways(name):
    first, *rest = batches(1.0, 4.0, 0.5)
    for source, target in ((theirs, ours), (ours, theirs)):
        trained, fresh = getattr(source, name)(), getattr(target, name)()
        trained(first)
        state = copy.deepcopy(trained.state_dict())  # the peer's histogram keeps the very tensors that it loads
        fresh.load_state_dict(state, strict=True)
        pair = (fresh, trained) if target is ours else (trained, fresh)
        check(*pair, rest)


def test_a_checkpoint_of_one_number_of_channels_replaces_another():
    peer = theirs.default_per_channel_weight_fake_quant()
    peer(torch.randn(7, 3))
    mine = ours.default_per_channel_weight_fake_quant()
    mine(torch.randn(4, 3))
    mine.load_state_dict(peer.state_dict(), strict=True)
    assert torch.equal(mine.scale, peer.scale)
    assert mine.zero_point.shape == (7,)


# --- learnable --------------------------------------------------------------------------------------------------------

LEARNABLE = {
    "per tensor": ("MovingAverageMinMaxObserver", {"qscheme": torch.per_tensor_affine}, -1),
    "per tensor, symmetric": ("MinMaxObserver", {"qscheme": torch.per_tensor_symmetric}, -1),
    "per channel": ("PerChannelMinMaxObserver", {"qscheme": torch.per_channel_affine, "ch_axis": 1}, 5),
    "per channel, symmetric": ("PerChannelMinMaxObserver", {"qscheme": torch.per_channel_symmetric, "ch_axis": 0}, 6),
}


def learnable(kind: str) -> tuple[ours.LearnableFakeQuantize, torch.nn.Module]:
    observer, arguments, channels = LEARNABLE[kind]
    arguments = {
        "dtype": torch.qint8, "quant_min": -8, "quant_max": 7, "channel_len": channels, "use_grad_scaling": True
    } | arguments  # fmt: skip
    mine = ours.LearnableFakeQuantize(getattr(our_observers, observer), **arguments)
    return mine, _LearnableFakeQuantize(getattr(their_observers, observer), **arguments)


@pytest.mark.parametrize("kind", LEARNABLE)
def test_learned_qparams_get_the_values_and_gradients_of_the_reference(kind):
    mine, peer = learnable(kind)
    first, *rest = batches(1.0, 1.3, 0.8)
    check(mine, peer, [first])
    for module in (mine, peer):
        module.enable_param_learning()
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.02) for module in (mine, peer)]
    for x in rest:
        for optimizer in optimizers:
            optimizer.zero_grad()
        for got, expected in zip(run(mine, x), run(peer, x), strict=True):
            assert torch.equal(got, expected)
        assert torch.equal(mine.scale.grad, peer.scale.grad)
        if "symmetric" not in kind:
            assert torch.equal(mine.zero_point.grad, peer.zero_point.grad)
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(mine.scale, peer.scale)


@pytest.mark.parametrize("kind", LEARNABLE)
def test_learnable_checkpoints_travel_both_ways(kind):
    mine, peer = learnable(kind)
    peer(batches(1.7)[0])
    mine.load_state_dict(peer.state_dict(), strict=True)
    again = learnable(kind)[1]
    again.load_state_dict(mine.state_dict(), strict=True)
    assert again.state_dict().keys() == peer.state_dict().keys()
    for key, tensor in peer.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor)


# --- all names --------------------------------------------------------------------------------------------------------


def test_every_name_of_the_peer_is_here():
    assert set(theirs.__all__) <= set(ours.__all__)
    for name in theirs.__all__:
        mine, peer = getattr(ours, name), getattr(theirs, name)
        assert isinstance(mine, type) == isinstance(peer, type), name
