"""A batch that fails half-way through a prepared model leaves every observer in it as it was."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torchao.quantization.pt2e as peer
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e._affine_quantization import AffineQuantizedMinMaxObserver as PeerBlocks

import pt2e_quant.observer as ours
from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.errors import CalibrationError
from pt2e_quant.fake_quantize import (
    AffineFakeQuantize,
    FakeQuantize,
    FusedMovingAvgObsFakeQuantize,
    LearnableFakeQuantize,
)
from pt2e_quant.meta import AROUND_KEY
from pt2e_quant.observer.batch import take_back, whole_batch
from pt2e_quant.quantizer import QuantizationSpec
from pt2e_quant.schemes import Scheme, quantization_spec
from tests.nets import export
from tests.pt2e.kit import STATIC, ByHand, Toy, annotate, the_call

aten = torch.ops.aten
TENSOR, CHANNEL = torch.per_tensor_affine, torch.per_channel_affine
CHANNELS_OF_1 = Scheme(dtype="int8", granularity="axis", axis=1)
BLOCKS = {"mapping_type": ours.MappingType.ASYMMETRIC, "target_dtype": torch.int8, "granularity": ours.PerAxis(1)}


class Own(ours.MinMaxObserver):
    """As users write them: with state of its own, and without a word to the engine."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


KINDS = {
    "range": (ours.MinMaxObserver, TENSOR),
    "average": (ours.MovingAverageMinMaxObserver.with_args(averaging_constant=0.3), TENSOR),
    "channels": (ours.PerChannelMinMaxObserver, CHANNEL),
    "average of channels": (ours.MovingAveragePerChannelMinMaxObserver.with_args(averaging_constant=0.3), CHANNEL),
    "counts": (ours.MSEObserver, TENSOR),
    "histogram": (ours.HistogramObserver.with_args(bins=32), TENSOR),
    "blocks": (ours.AffineQuantizedMinMaxObserver.with_args(**BLOCKS), None),
    "fake": (FakeQuantize.with_args(observer=ours.MinMaxObserver), TENSOR),
    "fused": (FusedMovingAvgObsFakeQuantize.with_args(averaging_constant=0.3), TENSOR),
    "learnable": (LearnableFakeQuantize.with_args(observer=ours.MinMaxObserver), TENSOR),
    "fake blocks": (AffineFakeQuantize.with_args(**BLOCKS), None),
    "scheme": (
        quantization_spec(CHANNELS_OF_1, qat=True, averaging_constant=0.3).observer_or_fake_quant_ctr,
        CHANNEL,
    ),
    "dynamic": (
        AffineFakeQuantize.with_args(**{**BLOCKS, "granularity": ours.PerTensor(), "is_dynamic": True}),
        None,
    ),
    "of a user": (Own, TENSOR),
    "torchao, range": (peer.MinMaxObserver, TENSOR),
    "torchao, histogram": (peer.HistogramObserver, TENSOR),
    "torchao, blocks": (
        PeerBlocks.with_args(
            mapping_type=peer.MappingType.ASYMMETRIC, target_dtype=torch.int8, granularity=peer.PerTensor()
        ),
        None,
    ),
    "torchao, fake": (peer.FakeQuantize.with_args(observer=peer.MovingAverageMinMaxObserver), TENSOR),
}


class Log(nn.Module):
    """NaN for negative inputs, after the first observers have seen them."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.log(x * 2.0) + 1.0


def spec(kind: str) -> QuantizationSpec:
    constructor, scheme = KINDS[kind]
    return QuantizationSpec(torch.int8, constructor, -128, 127, scheme, ch_axis=1 if scheme is CHANNEL else None)


def prepared(kind: str) -> GraphModule:
    def by_hand(gm: GraphModule) -> None:
        doubled, logarithm = the_call(gm, aten.mul.Tensor), the_call(gm, aten.log.default)
        annotate(doubled, {doubled.args[0]: spec(kind)}, spec(kind))
        annotate(logarithm, {}, spec(kind))

    return prepare_pt2e(export(Log(), torch.rand(3, 4) + 1), ByHand(by_hand))


def held(gm: GraphModule) -> dict[str, Any]:
    """All that the observers know."""
    found: dict[str, Any] = {name: value.tolist() for name, value in gm.state_dict().items()}
    for name, module in gm.named_modules():
        for attribute in ("tensor_val", "calls", "block_size", "min_val", "max_val"):
            value = getattr(module, attribute, None)
            found[f"{name}:{attribute}"] = copy.deepcopy(value) if not isinstance(value, Tensor) else value.tolist()
    return {name: repr(value) for name, value in found.items()}


def fails(gm: GraphModule) -> None:
    x = torch.tensor([[-300.0, 5.0, 500.0, -7.0]] * 3)
    with pytest.raises((CalibrationError, RuntimeError, AssertionError)):
        gm(x)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("torchao")])  # those take NaN in
def test_a_batch_with_nan_in_the_middle_leaves_no_trace(kind):
    gm, twin = prepared(kind), prepared(kind)
    empty = held(gm)
    fails(gm)
    assert held(gm) == empty
    for batch in (torch.rand(3, 4) + 1, torch.rand(3, 4) + 2):
        gm(batch), twin(batch)
        known = held(gm)
        fails(gm)
        assert held(gm) == known != empty
    gm(batch), twin(batch)
    assert held(gm) == held(twin)


class Lookup(nn.Module):
    """An index that the table does not have is an error of the run, after the first observers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 2)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return torch.abs(x * 2.0).sum() + self.table(index)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_any_error_of_a_run_leaves_no_trace(kind):
    def by_hand(gm: GraphModule) -> None:
        doubled = the_call(gm, aten.mul.Tensor)
        annotate(doubled, {doubled.args[0]: spec(kind)}, spec(kind))

    x, index = torch.rand(3, 4), torch.tensor([0, 3])
    gm = prepare_pt2e(export(Lookup(), x, index), ByHand(by_hand))
    for size in (1.0, 3.0):
        known = held(gm)
        with pytest.raises(IndexError):
            gm(x * 100, torch.tensor([0, 4]))
        assert held(gm) == known
        gm(x * size, index)
        assert held(gm) != known


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # export of cond looks at it
def test_a_branch_fails_with_all_that_came_before_it():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.left, self.right = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.before(x)
            return torch.cond(x.sum() > 0, lambda y: self.left(torch.log(y - 50.0)), lambda y: self.right(y), (y,))

    x = torch.ones(2, 4)
    with torch.no_grad():
        gm = prepare_pt2e(export(Branches(), x), Toy(STATIC))
    gm(-x)
    known = held(gm)
    with pytest.raises(CalibrationError, match="8 NaN among 8"):
        gm(x * 5)
    assert held(gm) == known


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_of_a_prepared_model_keep_the_promise(way):
    gm = prepared("counts")
    gm(torch.rand(3, 4) + 1)
    if way == "deepcopy":
        again = copy.deepcopy(gm)
    else:
        stream = io.BytesIO()
        torch.save(gm, stream)
        stream.seek(0)
        again = torch.load(stream, weights_only=False)
    known = held(again)
    fails(again)
    assert held(again) == known == held(gm)


def test_a_converted_model_runs_without_it():
    gm = prepared("range")
    gm(torch.rand(3, 4) + 1)
    assert AROUND_KEY in gm.meta
    assert AROUND_KEY not in convert_pt2e(gm).meta


def test_steps_are_taken_back_in_reverse_and_only_inside_a_run():
    done: list[int] = []
    recording = ours.RecordingObserver()

    @whole_batch(nn.Module())
    def interrupted() -> None:
        recording(torch.ones(2))
        for number in (1, 2):
            take_back(lambda number=number: done.append(number))
        with whole_batch(nn.Module()):  # a model inside another one
            take_back(lambda: done.append(3))
        raise KeyboardInterrupt

    take_back(lambda: done.append(0))
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (done, recording.tensor_val) == ([3, 2, 1], [])
    with whole_batch(nn.Module()):
        take_back(lambda: done.append(4))
    assert done == [3, 2, 1]
