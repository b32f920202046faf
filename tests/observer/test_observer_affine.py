"""Observers with one range per block: torchao's names, blocks and qparams."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torchao.quantization.granularity as torchao_granularity
from observer_data import torchao_pt2e
from torchao.quantization.pt2e import _affine_quantization as torchao_affine
from torchao.quantization.utils import get_block_size as torchao_block_size

import pt2e_quant.observer as ours
from pt2e_quant.errors import CalibrationError, CalibrationWarning, SpecError

ASYMMETRIC, SYMMETRIC = ours.MappingType.ASYMMETRIC, ours.MappingType.SYMMETRIC
NO_CLIPPING = ours.MappingType.SYMMETRIC_NO_CLIPPING_ERR

GRANULARITIES = {
    "tensor": ("PerTensor", ()),
    "axis 0": ("PerAxis", (0,)),
    "axis -1": ("PerAxis", (-1,)),
    "row": ("PerRow", ()),
    "row along 0": ("PerRow", (0,)),
    "token": ("PerToken", ()),
    "group": ("PerGroup", (4,)),
    "block": ("PerBlock", ((3, 4),)),
}
SHAPES = [(6, 8), (2, 6, 8), (2, 4, 3, 8)]


def granularities(name: str) -> tuple[object, object]:
    kind, arguments = GRANULARITIES[name]
    return getattr(ours, kind)(*arguments), getattr(torchao_granularity, kind)(*arguments)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", GRANULARITIES)
def test_blocks_have_the_shape_that_torchao_gives_them(name, shape):
    mine, theirs = granularities(name)
    assert repr(mine) == repr(theirs)
    assert ours.get_block_size(shape, mine) == tuple(torchao_block_size(shape, theirs)) or name == "axis -1"


def test_granularities_are_values():
    assert ours.PerGroup(32) == ours.PerGroup(32) != ours.PerGroup(64)
    assert len({ours.PerBlock((1, 32)), ours.PerBlock((1, 32)), ours.PerTensor()}) == 2


@pytest.mark.parametrize(
    ("shape", "granularity", "message"),
    [
        ((6, 8), ours.PerGroup(3), r"PerGroup\(group_size=3\) does not divide a tensor of shape \(6, 8\)"),
        ((6, 8), ours.PerBlock((1, 2, 2)), "does not divide"),
        ((6, 8), ours.PerAxis(2), "names a dimension"),
        ((), ours.PerToken(), "names a dimension"),
        ((6, 8), ours.PerGroup, "is not a granularity"),
        ((6, 8), ours.PerGroup(0), "does not divide"),
    ],
    ids=["group", "rank", "axis", "scalar", "class", "zero"],
)
def test_a_granularity_that_does_not_fit_is_refused(shape, granularity, message):
    with pytest.raises(SpecError, match=message):
        ours.get_block_size(shape, granularity)


@pytest.mark.parametrize("mapping", ["ASYMMETRIC", "SYMMETRIC", "SYMMETRIC_NO_CLIPPING_ERR"])
@pytest.mark.parametrize("name", GRANULARITIES)
def test_qparams_are_those_of_torchao(name, mapping):
    torch.manual_seed(3)
    data = [torch.randn(6, 8) * 2.5 + 0.5, torch.randn(6, 8) * 3.5 - 1.0, torch.randn(6, 8).abs()]
    mine, theirs = granularities(name)
    for kind, extra in (("MinMax", {}), ("MovingAverageMinMax", {"averaging_constant": 0.3})):
        for bounds in ((-128, 127), (-7, 7), (-8, 7)):
            arguments = {
                "target_dtype": torch.int8,
                "quant_min": bounds[0],
                "quant_max": bounds[1],
                "eps": 2**-10,
                **extra,
            }
            observer = getattr(ours, f"AffineQuantized{kind}Observer")(
                mapping_type=ours.MappingType[mapping], granularity=mine, **arguments
            )
            expected = getattr(torchao_affine, f"AffineQuantized{kind}Observer")(
                mapping_type=torchao_pt2e.MappingType[mapping], granularity=theirs, **arguments
            )
            for x in data:
                assert observer(x) is x
                expected(x)
            assert observer.block_size == tuple(expected.block_size) or name == "axis -1"
            for got, want in zip(observer.calculate_qparams(), expected.calculate_qparams(), strict=True):
                assert (got.tolist(), got.shape) == (want.tolist(), want.shape)


def test_types_of_the_results_can_be_chosen():
    observer = ours.AffineQuantizedMinMaxObserver(
        ASYMMETRIC, torch.uint8, ours.PerGroup(2), scale_dtype=torch.bfloat16, zero_point_dtype=torch.int8
    )
    observer(torch.tensor([[0.0, 25.5, -2.0, 2.0]]))
    scale, zero_point = observer.calculate_qparams()
    assert (scale.dtype, zero_point.dtype, scale.shape) == (torch.bfloat16, torch.int8, (1, 2))
    assert scale.flatten().tolist() == torch.tensor([0.1, 4 / 255]).bfloat16().tolist()


def test_the_engine_reads_scheme_and_axis():
    def made(mapping: ours.MappingType, granularity: ours.Granularity) -> ours.AffineQuantizedMinMaxObserver:
        return ours.AffineQuantizedMinMaxObserver(mapping, torch.int8, granularity, quant_min=-127)

    channels = made(SYMMETRIC, ours.PerAxis(1))
    assert (channels.qscheme, channels.ch_axis) == (torch.per_channel_symmetric, 1)
    assert made(ASYMMETRIC, ours.PerTensor()).qscheme is torch.per_tensor_affine
    assert (channels.dtype, channels.quant_min, channels.quant_max) == (torch.int8, -127, 127)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"granularity": ours.PerTensor}, "a granularity object such as"),
        ({"mapping_type": "SYMMETRIC"}, "needs a MappingType"),
        ({"preserve_zero": False}, "only preserve_zero=True"),
        ({"zero_point_domain": ours.ZeroPointDomain.FLOAT}, r"with ZeroPointDomain\.INT"),
        ({"quant_max": 128}, r"\[-128, 128\] is not a range"),
        ({"eps": 0.0}, "eps is the smallest scale"),
        ({"dtype": torch.uint8}, "contradicts dtype=torch.uint8"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_illegal_arguments_of_the_block_observers_are_refused(arguments, message):
    legal = {"mapping_type": ASYMMETRIC, "target_dtype": torch.int8, "granularity": ours.PerTensor()}
    with pytest.raises(SpecError, match=message):
        ours.AffineQuantizedMinMaxObserver(**{**legal, **arguments})


def test_a_dynamic_average_must_keep_the_last_batch_alone():
    arguments = (ASYMMETRIC, torch.int8, ours.PerTensor())
    with pytest.raises(SpecError, match="averaging_constant=1"):
        ours.AffineQuantizedMovingAverageMinMaxObserver(*arguments, is_dynamic=True)
    observer = ours.AffineQuantizedMovingAverageMinMaxObserver(*arguments, 1, is_dynamic=True)
    for high in (8.0, 2.0):
        observer(torch.tensor([0.0, high]))
    assert observer.calculate_qparams()[0].item() == pytest.approx(2 / 255)


def test_tensors_of_another_shape_are_refused_where_blocks_would_not_match():
    observer = ours.AffineQuantizedMinMaxObserver(SYMMETRIC, torch.int8, ours.PerToken())
    observer.site = "node linear = aten.linear.default(x, w)"
    observer(torch.ones(3, 8))
    with pytest.raises(CalibrationError, match=r"node linear .*blocks of shape \(3,\) before, and now \(5,\)"):
        observer(torch.ones(5, 8))
    assert observer.min_val.shape == (3,)


def test_state_merge_reset_copy_and_pickle():
    def made() -> ours.AffineQuantizedMinMaxObserver:
        return ours.AffineQuantizedMinMaxObserver(SYMMETRIC, torch.int8, ours.PerGroup(2))

    one, other, loaded = made(), made(), made()
    one.merge(other)
    assert not one.has_data
    other(torch.tensor([[1.0, -4.0, 2.0, 3.0]]))
    one.merge(other)
    one.merge(other)
    other(torch.tensor([[9.0, 0.0, 0.5, 0.0]]))
    assert one.max_val.tolist() == [[1.0, 3.0]]  # a copy, not the other's tensor
    one.merge(other)
    loaded.load_state_dict(one.state_dict(), strict=True)
    for observer in (one, loaded, copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert (observer.min_val.tolist(), observer.max_val.tolist()) == ([[-4.0, 0.0]], [[9.0, 3.0]])
    one.reset_min_max_vals()
    assert (one.has_data, one.block_size) == (False, None)
    with pytest.raises(CalibrationError, match="saw no data"):
        one.calculate_qparams()
    wider = made()
    wider(torch.ones(1, 8))
    with pytest.raises(CalibrationError, match="must watch the same tensor"):
        wider.merge(other)


def test_masks_are_left_out_of_each_block():
    observer = ours.AffineQuantizedMinMaxObserver(ASYMMETRIC, torch.int8, ours.PerGroup(2))
    with pytest.warns(CalibrationWarning, match="2 of 4 values"):
        observer(torch.tensor([[-torch.inf, 2.0, 3.0, torch.finfo(torch.float32).min]]))
    assert (observer.min_val.tolist(), observer.max_val.tolist()) == ([[2.0, 3.0]], [[2.0, 3.0]])


def test_a_placeholder_has_a_configuration_and_no_qparams():
    observer = ours.AffineQuantizedPlaceholderObserver(ASYMMETRIC, torch.int8, ours.PerToken(), is_dynamic=True)
    x = torch.ones(2, 3)
    assert observer(x) is x
    assert observer.has_data
    with pytest.raises(CalibrationError, match="has no qparams"):
        observer.calculate_qparams()
