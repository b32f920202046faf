"""A damaged calibration file is a CalibrationError, or loads what was saved; a false one is at least plausible."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import deserialize
from safetensors.torch import load, save
from torch import Tensor
from torch.fx import GraphModule

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.calibration import load_calibration, save_calibration
from pt2e_quant.errors import CalibrationError, FileError
from pt2e_quant.fake_quantize import FakeQuantize
from pt2e_quant.observer import (
    AffineQuantizedMinMaxObserver,
    HistogramObserver,
    MappingType,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MSEObserver,
    PerAxis,
    PerChannelMinMaxObserver,
    PerRow,
    PerTensor,
)
from pt2e_quant.quantizer import QuantizationConfig, QuantizationSpec
from tests.calibration.kit import EXPORTED, batches, prepared
from tests.pt2e.kit import Toy

Document = dict[str, Any]
Tensors = dict[str, Tensor]

JUNK = [None, True, -1, 0, 2**40, 10**400, float("nan"), "", "x", "counts", [], [None], {}, {"x": 1}, [[]]]


def per_channel() -> GraphModule:
    spec = QuantizationSpec(torch.int8, PerChannelMinMaxObserver, -120, 115, torch.per_channel_affine, ch_axis=1)
    return prepare_pt2e(EXPORTED, Toy(QuantizationConfig(spec, spec, None)))


def training() -> GraphModule:
    fake = FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, averaging_constant=0.25)
    spec = QuantizationSpec(torch.int8, fake, -120, 115, torch.per_tensor_affine)
    return prepare_pt2e(EXPORTED, Toy(QuantizationConfig(spec, spec, None)))


MODELS: dict[str, Callable[[], GraphModule]] = {
    "counts": lambda: prepared(MSEObserver),
    "range": lambda: prepared(MinMaxObserver),
    "average": lambda: prepared(MovingAverageMinMaxObserver),
    "histogram": lambda: prepared(HistogramObserver, bins=64),
    "channels": per_channel,
    "training": training,
}


class Saved:
    """A calibration file of a model, in bytes and in parts, and a blank model to load files into."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.path = folder / kind
        self.model = MODELS[kind]()
        self.blank = copy.deepcopy(self.model.state_dict())
        for batch in batches(2):
            self.model(*batch)
        save_calibration(self.model, self.path)
        self.state = copy.deepcopy(self.model.state_dict())
        self.data = self.path.read_bytes()
        header = json.loads(self.data[8 : 8 + int.from_bytes(self.data[:8], "little")])
        self.document: Document = json.loads(header["__metadata__"]["pt2e_quant"])
        self.tensors = load(self.data)

    def outcome(self, data: bytes) -> str:
        """'refused', 'same' or 'other', by what the model knows after loading."""
        self.path.write_bytes(data)
        self.model.load_state_dict(self.blank)
        try:
            load_calibration(self.model, self.path)
        except CalibrationError:
            assert equal(self.model.state_dict(), self.blank)
            return "refused"
        return "same" if equal(self.model.state_dict(), self.state) else "other"


def equal(one: Tensors, other: Tensors) -> bool:
    return all(one[key].shape == other[key].shape and torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module", params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    torch.manual_seed(0)
    return Saved(request.param, tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    torch.manual_seed(0)
    return Saved("counts", tmp_path_factory.mktemp("counted"))


def written(document: Any, tensors: Tensors, *, sign: bool) -> bytes:
    """A file of these; `sign` makes the checksum fit."""
    tensors = {name: value.clone() for name, value in tensors.items()}
    if sign and isinstance(document, dict):
        digest = hashlib.sha256(json.dumps(document | {"checksum": ""}, sort_keys=True).encode())
        for name, part in sorted(deserialize(save(tensors))):
            digest.update(json.dumps([name, part["dtype"], part["shape"]]).encode() + part["data"])
        document = document | {"checksum": digest.hexdigest()}
    return save(tensors, metadata={"pt2e_quant": json.dumps(document)})


# --- damage at random -------------------------------------------------------------------------------------------------


def damaged_bytes(data: bytes, chance: random.Random) -> bytes:
    """Bits flipped, an end cut off, a part cut out, overwritten or repeated."""
    changed, way = bytearray(data), chance.randrange(6)
    header = 8 + int.from_bytes(data[:8], "little")
    first, last = sorted(chance.randrange(len(data)) for _ in range(2))
    if way < 2:
        for _ in range(chance.choice((1, 1, 4))):
            changed[chance.randrange(header if way else len(data))] ^= 1 << chance.randrange(8)
        return bytes(changed)
    part = {2: b"", 3: chance.randbytes(last - first), 4: bytes(last - first), 5: data[first:last] * 2}[way]
    return data[:first] + (part + data[last:] if chance.random() < 0.7 else b"")


def flipped(value: Tensor, chance: random.Random) -> Tensor:
    if not value.numel():
        return value
    value = value.clone()
    value.reshape(-1).view(torch.uint8)[chance.randrange(value.nbytes)] ^= 1 << chance.randrange(8)
    return value


def replaced(value: Tensor, by: float) -> Tensor:
    value = value.clone()
    value.reshape(-1)[-1:] = by if value.is_floating_point() else int(by) if abs(by) < 2**40 else -1
    return value


TENSOR_WAYS: list[Callable[[Tensor, random.Random], Tensor]] = [
    flipped,
    lambda value, chance: -value if value.dtype is not torch.uint8 else value + 1,
    lambda value, chance: replaced(value, chance.choice((math.nan, math.inf, -math.inf, 1e30, -1e-30, 0.0, 3.0, 99.0))),
    lambda value, chance: value.to(chance.choice((torch.bool, torch.float16, torch.int32, torch.float64, torch.int64))),
    lambda value, chance: value.unsqueeze(0),
    lambda value, chance: value.reshape(-1)[:-1],
    lambda value, chance: value.reshape(-1).repeat(3),
    lambda value, chance: value.flip(0) if value.dim() else value * 2,
    lambda value, chance: (value.double() * chance.choice((0.5, 1.5, -2.0, 1e6)) + 1).to(value.dtype),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, item in items for found in places(item, (*path, key)))]


def edit_document(document: Document, chance: random.Random) -> None:
    """One value, anywhere, is another one, is gone, there twice, or in the place of its neighbour."""
    *path, last = chance.choice(places(document)[1:])
    owner: Any = document
    for key in path:
        owner = owner[key]
    way = chance.randrange(5)
    if way == 0:
        del owner[last]
    elif way == 1 and isinstance(owner, list):
        owner.append(owner[last])
    elif way == 2 and isinstance(owner, list):
        owner[last], owner[0] = owner[0], owner[last]
    elif way == 3 and len(document.get("observers", [])) > 1:
        one, other = chance.sample(document["observers"], 2)
        key = chance.choice(("name", "tensors", "kind", "arguments", "facts", "keys"))
        one[key], other[key] = other[key], one[key]
    else:
        owner[last] = chance.choice(JUNK)


def edit_tensors(tensors: Tensors, chance: random.Random) -> None:
    """One is changed, gone, called otherwise, added, or in the place of another."""
    one, other = chance.sample(sorted(tensors), 2)
    way = chance.randrange(8)
    if way == 0:
        tensors[one], tensors[other] = tensors[other], tensors[one]
    elif way == 1:
        tensors[chance.choice((one[:-1], f"{one}:size", other))] = tensors.pop(one)
    elif way == 2:
        tensors[f"{one}2"] = tensors[one]
    elif way == 3:
        del tensors[one]
    else:
        tensors[one] = chance.choice(TENSOR_WAYS)(tensors[one], chance).contiguous()


def edited(saved: Saved, chance: random.Random, *, sign: bool) -> bytes:
    document, tensors = copy.deepcopy(saved.document), dict(saved.tensors)
    if chance.random() < 0.5:
        edit_document(document, chance)
    else:
        edit_tensors(tensors, chance)
    return written(document, tensors, sign=sign)


def outcomes(saved: Saved, number: int, seed: int, *, sign: bool = False) -> Counter[str]:
    chance, found = random.Random(seed), Counter[str]()
    for n in range(number):
        with_checksum = edited(saved, chance, sign=sign)
        data = with_checksum if sign or n % 2 else damaged_bytes(saved.data, chance)
        outcome = saved.outcome(data)
        found[outcome] += 1
        if outcome == "other":
            assert sign, "a damaged file was loaded, and is not what was saved"
            assert_legal(saved.model)
    return found


def assert_legal(model: GraphModule) -> None:
    """What the observers know leads to qparams that exist, or to the error that they saw no data."""
    for name, observer in model.named_children():
        if not name.startswith("activation_post_process"):
            continue
        try:
            scale, zero_point = observer.calculate_qparams()
        except CalibrationError as error:
            assert "saw no data" in str(error)  # noqa: PT017  # both outcomes are right
            continue
        assert ((scale > 0) & scale.isfinite()).all()
        assert ((zero_point >= observer.quant_min) & (zero_point <= observer.quant_max)).all()


def test_what_is_saved_again_in_another_order_is_the_same(saved):
    assert saved.outcome(saved.data) == "same"
    assert saved.outcome(written(saved.document, dict(reversed(saved.tensors.items())), sign=False)) == "same"
    assert written(saved.document, saved.tensors, sign=False) == written(saved.document, saved.tensors, sign=True)


def test_a_damaged_file_is_refused_or_loads_what_was_saved(saved):
    assert outcomes(saved, 80, seed=1)["refused"] > 60  # what is not refused are edits that change nothing


def test_a_false_file_whose_checksum_fits_is_refused_or_plausible(saved):
    assert outcomes(saved, 80, seed=2, sign=True)["refused"] > 30


@pytest.mark.slow
@pytest.mark.parametrize("sign", [False, True])
def test_thousands_of_damaged_files_are_refused_or_load_what_was_saved(saved, sign):
    assert outcomes(saved, 400, seed=3, sign=sign).total() == 400


# --- false on purpose, with a checksum that fits ----------------------------------------------------------------------


def changed(saved: Saved, key: str, change: Callable[[Tensor], Tensor]) -> bytes:
    tensors = {name: change(value) if name.endswith(f".{key}") else value for name, value in saved.tensors.items()}
    return written(saved.document, tensors, sign=True)


def refusal(saved: Saved, data: bytes, path: Path) -> str:
    path.write_bytes(data)
    with pytest.raises(CalibrationError) as raised:
        load_calibration(saved.model, path)
    return str(raised.value)


@pytest.mark.parametrize(
    ("kind", "key", "change", "reason"),
    [
        ("counts", "counts:values", lambda v: -v, "counts has negative counts"),
        ("counts", "counts:values", lambda v: v * 2**50, "counts has negative counts, or more than"),
        ("counts", "counts:values", lambda v: v * 0, "counts has 0 values, and min_val and max_val say otherwise"),
        ("counts", "counts:values", lambda v: v.int(), "is stored as torch.int64, torch.int64, torch.int32"),
        ("counts", "counts:values", lambda v: v[1:], r"values for \(\d+,\) places"),
        ("counts", "counts:places", lambda v: v.flip(0), "has places outside of 0 to 32767, or out of order"),
        ("counts", "counts:places", lambda v: v + 2**15, "has places outside of 0 to 32767, or out of order"),
        ("counts", "counts:places", lambda v: v + 64, "counts does not end where m.._val lies"),
        (
            "counts",
            "counts:places",
            lambda v: v.clamp(max=255 * 64) + torch.arange(len(v)),
            "infinite or NaN|end where",
        ),
        ("counts", "counts:size", lambda v: v * 2**30, "has 35184372088832 elements, the observer 32768"),
        ("counts", "counts:size", lambda v: -v, "has -32768 elements, the observer 32768"),
        ("counts", "min_val", lambda v: v * 1.1, "counts does not end where min_val lies"),
        ("counts", "max_val", lambda v: v * 0.9, "counts does not end where max_val lies"),
        ("counts", "max_val", lambda v: v * math.inf, "or max_val is not finite"),
        ("range", "min_val", lambda v: v * math.nan, "or max_val is not finite"),
        ("range", "min_val", lambda v: v + 1e6, "min_val lies above max_val"),
        ("range", "max_val", lambda v: v * -math.inf, "min_val lies above max_val"),
        ("range", "max_val", lambda v: v.double(), "max_val is torch.float64, not torch.float32"),
        ("range", "max_val", lambda v: v.repeat(7), r"max_val has shape \(7,\), not \(\)"),
        ("histogram", "histogram", lambda v: -v, "histogram is negative somewhere"),
        ("histogram", "histogram", lambda v: v * math.inf, "histogram is negative somewhere, or not finite"),
        ("histogram", "histogram", lambda v: v * 0, "histogram is not that of min_val and max_val"),
        ("histogram", "histogram", lambda v: v[1:], r"histogram has shape \(63,\), not \(64,\)"),
        ("channels", "min_val", lambda v: v[1:], r"min_val has shape \(2,\), not \(3,\)"),
        ("channels", "min_val", lambda v: v.where(v > v.min(), math.nan), "or max_val is not finite"),
        ("channels", "max_val", lambda v: v.where(v < v.max(), -99.0), "min_val lies above max_val"),
        ("training", "scale", lambda v: v * 0, "scale is not positive and finite"),
        ("training", "scale", lambda v: v * math.nan, "scale is not positive and finite"),
        ("training", "zero_point", lambda v: v + 999, r"zero_point lies outside of \(-120, 115\)"),
        ("training", "observer_enabled", lambda v: v + 2, "observer_enabled is neither on nor off"),
    ],
)
def test_what_no_data_can_have_led_to_is_refused_with_the_place(kind, key, change, reason, tmp_path):
    saved = Saved(kind, tmp_path)
    told = refusal(saved, changed(saved, key, change), tmp_path / "false")
    assert "the calibration file says of 'activation_post_process_" in told
    assert "node " in told or "input " in told
    assert re.search(reason, told)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 3}, "it has version 3, and only version 2 is read. Calibrate again"),
        ({"version": "2"}, "it has version '2'"),
        ({"format": "pt2e_quant calibration 1"}, "without a checksum; only version 2 is read. Calibrate again"),
        ({"format": "weights"}, "its format is 'weights'"),
        ({"checksum": "0" * 64}, "its checksum does not fit its content"),
        ({"observers": None}, "observers is None, not a list"),
        ({"more": 1}, "_Document does not have 'more'"),
    ],
)
def test_a_document_of_another_form_is_refused(change, reason, counted, tmp_path):
    assert reason in refusal(counted, written(counted.document | change, counted.tensors, sign=False), tmp_path / "f")


def test_tensors_that_belong_to_no_observer_are_refused(counted, tmp_path):
    for tensors in ({**counted.tensors, "more": torch.ones(1)}, dict(list(counted.tensors.items())[1:])):
        told = refusal(counted, written(counted.document, tensors, sign=True), tmp_path / "f")
        assert "its tensors are not those of its observers" in told


def test_a_header_longer_than_the_file_is_not_read(counted, tmp_path):
    told = refusal(counted, (2**60).to_bytes(8, "little") + counted.data[8:], tmp_path / "f")
    assert "does not begin with the header of safetensors" in told


# --- what is saved ----------------------------------------------------------------------------------------------------


def test_eps_belongs_to_the_configuration_and_not_to_the_file(tmp_path):
    """A file of an observer with one smallest scale leaves that of another one alone."""
    coarse, fine = prepared(HistogramObserver), prepared(HistogramObserver)
    for observer in (one for name, one in fine.named_children() if name.startswith("activation_post_process")):
        if isinstance(observer, HistogramObserver):
            observer.eps.fill_(2**-20)
    for batch in batches(1):
        coarse(*batch)
    save_calibration(coarse, tmp_path / "file")
    load_calibration(fine, tmp_path / "file")
    kept = {float(one.eps) for one in fine.children() if isinstance(one, HistogramObserver)}
    assert kept == {2**-20}
    assert not any(name.endswith("eps") for name in load((tmp_path / "file").read_bytes()))


def test_a_fake_quantizer_takes_nothing_from_one_with_another_observer(tmp_path):
    save_calibration(training(), tmp_path / "average")
    fake = FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, averaging_constant=0.5)
    spec = QuantizationSpec(torch.int8, fake, -120, 115, torch.per_tensor_affine)
    other = prepare_pt2e(EXPORTED, Toy(QuantizationConfig(spec, spec, None)))
    with pytest.raises(CalibrationError, match="has nothing for FakeQuantize on x"):
        load_calibration(other, tmp_path / "average")


def test_what_an_observer_cannot_have_learned_is_not_saved(tmp_path):
    model = prepared(MinMaxObserver)
    observer = next(one for one in model.children() if isinstance(one, MinMaxObserver))
    observer.min_val.fill_(math.nan)
    with pytest.raises(
        CalibrationError, match=r"(?s)so it is not saved: min_val .*max_val is not finite.*(node|input) "
    ):
        save_calibration(model, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


class Elsewhere(MinMaxObserver):
    """Keeps what it learned as torchao's observers do."""

    def forward(self, x: Tensor) -> Tensor:
        self.mean = x.mean()
        return super().forward(x)


def test_what_is_kept_outside_of_buffers_is_not_left_out_in_silence(tmp_path):
    model = prepared(Elsewhere)
    for batch in batches(1):
        model(*batch)
    with pytest.raises(CalibrationError, match="Elsewhere keeps mean in plain attributes"):
        save_calibration(model, tmp_path / "file")


@pytest.mark.parametrize("granularity", [PerTensor(), PerAxis(1), PerRow()])
def test_blocks_are_those_of_the_model_that_was_calibrated(granularity, tmp_path):
    ctr = AffineQuantizedMinMaxObserver.with_args(
        mapping_type=MappingType.ASYMMETRIC, target_dtype=torch.int8, granularity=granularity
    )
    spec = QuantizationSpec(torch.int8, ctr, -120, 115, torch.per_tensor_affine)
    x = torch.randn(4, 6)
    exported = torch.export.export(torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.ReLU()).eval(), (x,))
    first, second = (prepare_pt2e(exported, Toy(QuantizationConfig(spec, spec, None))) for _ in range(2))
    first(x)
    save_calibration(first, tmp_path / "file")
    load_calibration(second, tmp_path / "file")
    assert torch.equal(convert_pt2e(second)(x), convert_pt2e(first)(x))


def test_a_damaged_part_leaves_what_the_model_knew(counted, tmp_path):
    model = prepared(MSEObserver)
    for batch in batches(1):
        model(*batch)
    before = copy.deepcopy(model.state_dict())
    (tmp_path / "whole").write_bytes(counted.data)
    (tmp_path / "cut").write_bytes(counted.data[:-1])
    with pytest.raises(CalibrationError, match="cut is damaged"):
        load_calibration(model, tmp_path / "whole", tmp_path / "cut")
    assert equal(model.state_dict(), before)


def test_a_full_disk_leaves_the_last_calibration(counted, tmp_path, small_disk):
    (tmp_path / "file").write_bytes(b"last")
    model = prepared(MSEObserver)
    for batch in batches(1):
        model(*batch)
    with pytest.raises(FileError, match=r"cannot write .*file: File too large"):
        save_calibration(model, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"last"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_missing_folder_is_typed(counted, tmp_path):
    with pytest.raises(FileError, match="No such file or directory"):
        save_calibration(prepared(MinMaxObserver), tmp_path / "missing" / "file")
    with pytest.raises(CalibrationError, match=r"cannot read .*No such file or directory"):
        load_calibration(prepared(MinMaxObserver), tmp_path / "missing" / "file")
