"""Calibration in two processes gives what one process gives that sees all of the data."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pt2e_quant.calibration import save_calibration
from pt2e_quant.calibration.watched import watched
from pt2e_quant.distributed import merge_ranks
from pt2e_quant.errors import DistributedError, SpecError
from pt2e_quant.observer import MinMaxObserver, MovingAverageMinMaxObserver, MSEObserver
from tests.calibration.kit import batches, calibrated, prepared
from tests.distributed.kit import one_process, outcome, run_ranks

DATA = batches(5)
EXACT = (MSEObserver, MinMaxObserver)


def part_of_the_data():
    return DATA[dist.get_rank() :: dist.get_world_size()]


def bytes_of(model, path):
    save_calibration(model, path)
    return path.read_bytes()


def averages(model):
    found = [m for m in model.modules() if isinstance(m, MovingAverageMinMaxObserver)]
    return [(float(one.min_val), float(one.max_val)) for one in found]


def every_case(folder):
    """All facts in one pair of processes."""
    rank = dist.get_rank()
    found = {}
    for kind in EXACT:
        model = calibrated(part_of_the_data(), kind)
        merge_ranks(model)
        found[kind.__name__] = bytes_of(model, folder / f"{kind.__name__}{rank}.safetensors")
    found["again"] = outcome(lambda: merge_ranks(model))
    average = calibrated(part_of_the_data(), MovingAverageMinMaxObserver)
    merge_ranks(average)
    found["average"] = averages(average)
    found["no data"] = outcome(lambda: merge_ranks(calibrated(DATA[:1] if rank == 0 else [])))
    other = calibrated(DATA[:1], quant_min=-100 - rank)
    found["another"] = outcome(lambda: merge_ranks(other))
    broken = calibrated(DATA[:1], MinMaxObserver)
    first, second = (site.observer for site in watched(broken)[:2])
    if rank == 1:
        first.max_val.fill_(torch.nan)
    second.max_val.add_(rank)
    before = second.max_val.clone()
    found["nan"] = outcome(lambda: merge_ranks(broken))
    found["untouched"] = torch.equal(second.max_val, before)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return run_ranks(every_case, folder, folder)


@pytest.mark.parametrize("kind", EXACT)
def test_two_processes_write_the_bytes_that_one_writes(ranks, kind, tmp_path):
    alone = bytes_of(calibrated(DATA, kind), tmp_path / "alone.safetensors")
    assert [rank[kind.__name__] == alone for rank in ranks] == [True, True]


def test_merged_averages_lie_where_those_of_one_process_do(ranks):
    """An average is a convex combination of the ends of batches, merged ones are the outermost of two such averages:
    both lie between the smallest and the largest end of any batch, and so do not differ by more than that."""
    ends = [averages(calibrated([batch], MovingAverageMinMaxObserver)) for batch in DATA]
    alone = averages(calibrated(DATA, MovingAverageMinMaxObserver))
    assert ranks[0]["average"] == ranks[1]["average"]
    for site, merged in enumerate(ranks[0]["average"]):
        for end, value in enumerate(merged):
            seen = [batch[site][end] for batch in ends]
            assert min(seen) <= value <= max(seen)
            assert abs(value - alone[site][end]) <= max(seen) - min(seen)


def test_a_rank_without_data_is_named_on_every_rank(ranks):
    for rank in ranks:
        assert rank["no data"][0] == "DistributedError"
        assert rank["no data"][1].startswith("rank 1 of 2 saw no data")


def test_ranks_that_prepared_other_models_are_refused(ranks):
    for rank in ranks:
        assert rank["another"][0] == "DistributedError"
        assert "ranks 0 and 1 hold different models" in rank["another"][1]


def test_what_is_wrong_on_one_rank_is_an_error_on_all(ranks):
    for rank in ranks:
        assert rank["nan"][0] == "CalibrationError"
        assert rank["nan"][1].startswith("rank 1: ")
        assert rank["untouched"]


def test_merging_twice_is_refused(ranks):
    assert [rank["again"][0] for rank in ranks] == ["CalibrationError"] * 2


def one_is_late():
    model = calibrated(DATA[:1])
    if dist.get_rank() == 1:
        time.sleep(2)
        return None
    start = time.monotonic()
    return outcome(lambda: merge_ranks(model, timeout=0.5)), time.monotonic() - start


def test_a_rank_that_does_not_come_is_named_within_the_timeout(tmp_path):
    (error, text), seconds = run_ranks(one_is_late, tmp_path)[0]
    assert error == "DistributedError"
    assert "rank 0 of 2 waited for the others to merge their calibration" in text
    assert "Ranks 1 failed" in text
    assert 0.5 <= seconds < 10  # the group itself waits for 60 s


@pytest.mark.slow
def test_the_script_of_the_documentation_writes_under_torchrun_what_one_process_writes(tmp_path):
    text = (Path(__file__).parents[2] / "docs/distributed.md").read_text()
    script = tmp_path / "calibrate.py"
    script.write_text(re.search(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[1])
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    written = []
    for start in ([], torchrun):
        subprocess.run([sys.executable, *start, script], cwd=tmp_path, check=True, capture_output=True)
        written.append((tmp_path / "calibration.safetensors").read_bytes())
    assert written[0] == written[1]


def test_without_a_group_of_processes_there_is_an_error():
    with pytest.raises(DistributedError, match="torchrun"):
        merge_ranks(prepared())
    with pytest.raises(DistributedError, match="prepared must be"):
        merge_ranks("model")


def test_a_timeout_is_a_number_of_seconds_and_a_group_is_one():
    with one_process():
        with pytest.raises(SpecError, match="seconds > 0"):
            merge_ranks(prepared(), timeout=0)
        with pytest.raises(DistributedError, match="group is a process group"):
            merge_ranks(prepared(), group="gloo")
