"""Rounding with one scale per block, and learnable ranges: torchao's classes are the oracle, its objects are taken."""

from __future__ import annotations

import pytest
import torch
import torchao.quantization.pt2e as peer
from torch import Tensor, nn
from torchao.quantization.pt2e import fake_quantize as peer_fake

import pt2e_quant.fake_quantize as ours
from pt2e_quant.errors import CalibrationError, SpecError
from pt2e_quant.observer import (
    AffineQuantizedMinMaxObserver,
    AffineQuantizedMovingAverageMinMaxObserver,
    AffineQuantizedPlaceholderObserver,
    MappingType,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerAxis,
    PerBlock,
    PerGroup,
    PerRow,
    PerTensor,
    PerToken,
)

GRANULARITIES = [
    (PerTensor(), peer.PerTensor()),
    (PerAxis(1), peer.PerAxis(1)),
    (PerRow(-1), peer.PerRow(-1)),
    (PerToken(), peer.PerToken()),
    (PerGroup(8), peer.PerGroup(8)),
    (PerBlock((2, 4)), peer.PerBlock((2, 4))),
]
RECIPES = ["default_affine_fake_quant", "default_groupwise_fake_quant", "default_affine_per_axis_fake_quant"]


def data(shape: tuple[int, ...] = (6, 24)) -> Tensor:
    """Rows of different sizes, so that a scale in the wrong place cannot go unnoticed."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    return x * torch.logspace(-1, 1, shape[0]).reshape(-1, *[1] * (len(shape) - 1)) + 0.1


def gradient(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = module(x)
    (out * torch.linspace(-1, 2, out.numel()).reshape(out.shape)).sum().backward()
    return out.detach(), x.grad


def pair(mapping: str, granularity: tuple[object, object], **arguments: object) -> tuple[nn.Module, nn.Module]:
    mine, theirs = granularity
    return (
        ours.AffineFakeQuantize(mapping_type=MappingType[mapping], granularity=mine, **arguments),
        peer_fake.AffineFakeQuantize(mapping_type=peer.MappingType[mapping], granularity=theirs, **arguments),
    )


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda pair: str(pair[0]))
@pytest.mark.parametrize("mapping", ["SYMMETRIC", "ASYMMETRIC", "SYMMETRIC_NO_CLIPPING_ERR"])
def test_blocks_are_rounded_as_torchao_rounds_them(mapping, granularity):
    mine, theirs = pair(mapping, granularity, target_dtype=torch.int8, quant_min=-11, quant_max=9, eps=2**-13)
    for x in (data(), data() * 0.7):
        for got, expected in zip(gradient(mine, x), gradient(theirs, x), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)  # they divide by the scale, the op multiplies
    assert mine.block_size == tuple(theirs.block_size)
    assert mine.scale.flatten().tolist() == theirs.scale.flatten().tolist()


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_of_torchao_round_as_there(name):
    x = data((4, 256))
    got, expected = (getattr(package, name)()(x) for package in (ours, peer_fake))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_the_average_of_a_range_is_rounded_to():
    """By hand: 4 + 0.25 * (8 - 4) = 5, over 127.5 steps."""
    fake = ours.AffineFakeQuantize(
        AffineQuantizedMovingAverageMinMaxObserver, averaging_constant=0.25, mapping_type=MappingType.SYMMETRIC,
        target_dtype=torch.int8, granularity=PerTensor(),
    )  # fmt: skip
    for high in (4.0, 8.0):
        fake(torch.tensor([0.0, high]))
    assert fake.scale.item() == pytest.approx(5 / 127.5)


def test_a_dynamic_range_is_that_of_each_tensor_alone():
    fake = ours.AffineFakeQuantize(
        is_dynamic=True, mapping_type=MappingType.SYMMETRIC, target_dtype=torch.int8, granularity=PerToken()
    )
    fake(torch.full((3, 2), 100.0))
    x = torch.tensor([[1.0, -0.25], [8.0, 2.0]])
    steps = x.abs().amax(1, keepdim=True) / 127.5
    assert torch.equal(fake(x), (x * (1 / steps)).round().clamp(-128, 127) * steps)


def test_8_bit_floats_are_rounded_as_the_q_dq_ops_round_them():
    x = data()
    fake = ours.AffineFakeQuantize(
        mapping_type=MappingType.ASYMMETRIC, target_dtype=torch.float8_e4m3fn, granularity=PerTensor()
    )
    scale = x.abs().max().item() / 448
    arguments = (fake(x), *(part.item() for part in fake.calculate_qparams()))
    assert arguments[1:] == (pytest.approx(scale), 0)
    limits = (arguments[1], 0, -448, 448, torch.float8_e4m3fn)
    q = torch.ops.quantized_decomposed.quantize_per_tensor(x, *limits)
    assert torch.equal(arguments[0], torch.ops.quantized_decomposed.dequantize_per_tensor(q, *limits))


def test_the_state_travels_through_a_checkpoint_and_from_torchao():
    mine, theirs = pair("SYMMETRIC", GRANULARITIES[4], target_dtype=torch.int8)
    x = data()
    expected = theirs(x)
    mine(data() * 9)
    mine.load_state_dict(theirs.state_dict(), strict=False)  # torchao keeps the ranges in no buffers
    mine.disable_observer()
    torch.testing.assert_close(mine(x), expected, rtol=1e-6, atol=0)
    again = ours.AffineFakeQuantize(
        mapping_type=MappingType.SYMMETRIC, target_dtype=torch.int8, granularity=PerGroup(8)
    )
    again.load_state_dict(mine.state_dict())
    again.disable_observer()
    assert torch.equal(again(x), mine(x))


@pytest.mark.parametrize(
    ("observer", "message"),
    [
        (MinMaxObserver, "MinMaxObserver cannot be made with"),
        (AffineQuantizedPlaceholderObserver, "looks at no data"),
        (lambda **kwargs: MinMaxObserver(), "such as AffineQuantizedMinMaxObserver, got MinMaxObserver"),
        (AffineQuantizedMinMaxObserver(MappingType.SYMMETRIC, torch.int8, PerTensor()), "an object"),
    ],
    ids=["no blocks", "placeholder", "another", "object"],
)
def test_an_observer_without_blocks_is_refused(observer, message):
    with pytest.raises((SpecError, CalibrationError), match=message):
        ours.AffineFakeQuantize(
            observer, mapping_type=MappingType.SYMMETRIC, target_dtype=torch.int8, granularity=PerTensor()
        )(torch.ones(2)).calculate_qparams()


def test_a_tensor_with_other_blocks_is_refused():
    fake = ours.default_affine_per_axis_fake_quant()
    fake(data())
    fake.disable_observer()
    with pytest.raises(CalibrationError, match=r"scales for 6 blocks, and a tensor of shape \(5, 24\), which has 5"):
        fake(data((5, 24)))


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda pair: str(pair[0]))
def test_objects_of_torchao_are_taken_for_their_namesakes(granularity):
    mine, theirs = granularity
    own = AffineQuantizedMinMaxObserver(MappingType.ASYMMETRIC, torch.int8, mine)
    foreign = AffineQuantizedMinMaxObserver(peer.MappingType.ASYMMETRIC, torch.int8, theirs)
    own(data()), foreign(data())
    assert (foreign.granularity, foreign.mapping_type) == (mine, MappingType.ASYMMETRIC)
    assert [part.tolist() for part in foreign.calculate_qparams()] == [
        part.tolist() for part in own.calculate_qparams()
    ]


def test_enums_of_torchao_are_taken_for_their_namesakes():
    observer = AffineQuantizedMinMaxObserver(
        peer.MappingType.SYMMETRIC, torch.int4, peer.PerTensor(), zero_point_domain=peer.ZeroPointDomain.INT
    )
    assert (observer.dtype, observer.quant_min, observer.quant_max) == (torch.int4, -8, 7)
    with pytest.raises(SpecError, match=r"only preserve_zero=True with ZeroPointDomain\.INT"):
        AffineQuantizedMinMaxObserver(
            peer.MappingType.SYMMETRIC, torch.int8, peer.PerTensor(), zero_point_domain=peer.ZeroPointDomain.FLOAT
        )


# --- learnable, as torchao has it -------------------------------------------------------------------------------------


def learnable() -> tuple[nn.Module, nn.Module]:
    arguments = {"quant_min": 0, "quant_max": 250, "qscheme": torch.per_tensor_affine, "averaging_constant": 0.5}
    mine = ours.LearnableFakeQuantize(MovingAverageMinMaxObserver, dtype=torch.quint8, **arguments)
    return mine, peer.LearnableFakeQuantize(peer.MovingAverageMinMaxObserver, dtype=torch.uint8, **arguments)


def test_range_learning_is_switched_on_and_off_as_in_torchao():
    modules = learnable()
    for x in (data(), data() * 2):
        expected, got = (module(x) for module in reversed(modules))
        assert torch.equal(got, expected)
    for module, package in zip(modules, (ours, peer), strict=True):
        nn.Sequential(module).apply(package.enable_range_learning)
        assert (module.learning_enabled.item(), module.scale.requires_grad) == (1, True)
        out = module(data() * 5)  # outside of the range: the observer rests
        (out * torch.linspace(-1, 2, out.numel()).reshape(out.shape)).sum().backward()
    mine, theirs = modules
    assert torch.equal(mine(data() * 5), theirs(data() * 5))
    torch.testing.assert_close(mine.scale.grad, theirs.scale.grad, rtol=1e-6, atol=0)
    for module, package in zip(modules, (ours, peer), strict=True):
        nn.Sequential(module).apply(package.disable_range_learning)
        assert (module.learning_enabled.item(), module.scale.requires_grad) == (0, False)
    assert torch.equal(mine(data() * 7), theirs(data() * 7))


def test_an_observer_that_is_switched_on_ends_learning():
    mine, theirs = learnable()
    for module in (mine, theirs):
        module(data())
        module.enable_range_learning()
        module.enable_observer()
        assert (module.learning_enabled.item(), module.scale.requires_grad) == (0, False)
    assert torch.equal(mine(data() * 3), theirs(data() * 3))


def test_modules_that_learn_nothing_are_passed_over():
    model = nn.Sequential(nn.Linear(2, 2), ours.default_fake_quant())
    model.apply(ours.enable_range_learning)
    assert model[1].observer_enabled.item() == 1


def test_a_learnable_checkpoint_of_torchao_loads():
    mine, theirs = learnable()
    theirs(data())
    theirs.enable_range_learning()
    mine.load_state_dict(theirs.state_dict(), strict=True)
    assert (mine.static_enabled.item(), mine.learning_enabled.item()) == (0, 1)
    assert torch.equal(mine(data() * 2), theirs(data() * 2))
