"""A damaged report is a typed error, or a report on which everything works."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pt2e_quant import QuantizedIO, Report, convert_pt2e, explain, prepare_pt2e
from pt2e_quant.errors import CaptureError, FileError
from tests.nets import ConvNet, Residual, export
from tests.pt2e.kit import STATIC, Toy

JUNK = [None, True, -1, 0, 3, 10**400, 1e999, -1e-300, float("nan"), "", "x", "float32", [], [None], {}, {"x": 1}, [[]]]


def made(module: torch.nn.Module, *shape: int, **convert: Any) -> Report:
    x = torch.randn(*shape)
    prepared = prepare_pt2e(export(module, x), Toy(STATIC))
    prepared(x)
    explain(prepared, [x])
    return explain(convert_pt2e(prepared, **convert))


@pytest.fixture(scope="module")
def reports() -> list[Report]:
    """Ranges of single tensors, scales per channel, folded batch norm, integer inputs."""
    io = QuantizedIO(inputs=(0,))
    return [made(Residual(), 1, 4, 6, 6, quantized_io=io), made(ConvNet(), 1, 3, 16, 16)]


def use(report: Report) -> None:
    """All that can be asked of a report."""
    assert report.text()
    assert Report.from_json(report.to_json()).text() == report.text()
    json.dumps([report.to_model_explorer("decision"), report.to_model_explorer("bits_lost")])
    for place in (*report.record.decisions, *report.record.folded):
        assert report.why(place.node)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to all values inside plain values."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, item in items for found in places(item, (*path, key)))]


def edited(plain: Any, chance: random.Random) -> str:
    """One value, anywhere, is another one, or is gone, or there twice."""
    plain = copy.deepcopy(plain)
    *path, last = chance.choice(places(plain)[1:])
    owner = plain
    for key in path:
        owner = owner[key]
    kind = chance.randrange(4)
    if kind == 0:
        del owner[last]
    elif kind == 1 and isinstance(owner, list):
        owner.append(owner[last])
    elif kind == 2:
        owner[last] = copy.deepcopy(plain)
    else:
        owner[last] = chance.choice(JUNK)
    return json.dumps(plain)


def flipped(text: str, chance: random.Random) -> bytes:
    data = bytearray(text.encode())
    for _ in range(chance.choice((1, 1, 3))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def cut(text: str, chance: random.Random) -> bytes:
    first, last = sorted(chance.randrange(len(text)) for _ in range(2))
    return (text[:first] + text[last:]).encode()


def damaged(report: Report, number: int) -> list[str | bytes]:
    chance, text = random.Random(0), report.to_json()
    plain = json.loads(text)
    ways: list[Callable[[], str | bytes]] = [
        lambda: edited(plain, chance),
        lambda: flipped(text, chance),
        lambda: cut(text, chance),
    ]
    return [ways[n % 3 if n % 6 else 0]() for n in range(number)]


def outcomes(reports: list[Report], number: int) -> Counter[str]:
    found: Counter[str] = Counter()
    for report in reports:
        for data in damaged(report, number):
            try:
                read = Report.from_json(data)
            except CaptureError:
                found["refused"] += 1
            else:
                use(read)
                found["read"] += 1
    return found


def test_a_damaged_report_is_refused_or_works(reports):
    found = outcomes(reports, 300)
    assert found["refused"] > 300  # nearly all but changes of one letter in a name or of one digit
    assert found["read"] > 10


@pytest.mark.slow
def test_thousands_of_damaged_reports_are_refused_or_work(reports):
    assert outcomes(reports, 4000).total() == 8000


@pytest.mark.parametrize(
    ("section", "change", "reason"),
    [
        ("groups", {"scale": -1.0}, "has scale -1.0"),
        ("groups", {"scale": float("nan")}, "has scale nan"),
        ("groups", {"scale": []}, r"has scale \[\]"),
        ("groups", {"scale": None}, "has scale None"),
        ("groups", {"range": [3.0, 1.0]}, r"range \(3\.0, 1\.0\)"),
        ("groups", {"own": [{"tensor": "x", "low": 0.0, "high": 1.0, "scale": 0.0}]}, "of x, the range"),
        ("inputs", {"zero_point": 300}, "zero_point=300"),
        ("inputs", {"dtype": "float32"}, "dtype=torch.float32"),
    ],
)
def test_numbers_that_no_model_has_are_refused(section, change, reason, reports):
    plain = json.loads(reports[0].to_json())
    one_scale = [index for index, group in enumerate(plain["groups"]) if isinstance(group["scale"], float)]
    plain[section]["0" if section == "inputs" else one_scale[0]] |= change
    with pytest.raises(CaptureError, match=f"this report is damaged: .*{reason}"):
        Report.from_json(json.dumps(plain))


@pytest.mark.parametrize("name", ["example_inputs", "state"])
def test_what_reports_never_hold_is_refused(name, reports):
    plain = json.loads(reports[0].to_json())
    with pytest.raises(CaptureError, match=f"{name} of a model are never saved"):
        Report.from_json(json.dumps({**plain, name: None}))


def test_a_file_that_is_not_text_is_refused_with_its_name(tmp_path):
    (tmp_path / "report.json").write_bytes(b"\xff\x00\xfe")
    with pytest.raises(CaptureError, match=r"report\.json: this is not the JSON of a report"):
        Report.load(tmp_path / "report.json")


def test_a_full_disk_leaves_the_files_of_the_last_report(reports, tmp_path, request):
    reports[0].save(tmp_path / "report")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    request.getfixturevalue("small_disk")
    with pytest.raises(FileError, match=r"cannot write .*report\.\w+: File too large"):
        reports[1].save(tmp_path / "report")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_in_the_way_leaves_the_other_files_of_the_last_report(reports, tmp_path):
    reports[0].save(tmp_path / "report")
    (tmp_path / "report.model_explorer.json").unlink()
    (tmp_path / "report.model_explorer.json").mkdir()
    text = (tmp_path / "report.txt").read_text()
    with pytest.raises(FileError, match="Is a directory"):
        reports[1].save(tmp_path / "report")
    assert (tmp_path / "report.txt").read_text() == text
    assert len(list(tmp_path.iterdir())) == 4
