"""adaround and reconstruct_blocks: less error than rounding to the nearest, within the bounds of q, repeatable."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

from pt2e_quant import convert_pt2e
from pt2e_quant.algorithms import adaround, correct_bias, reconstruct_blocks
from pt2e_quant.algorithms.blocks import blocks_of
from pt2e_quant.algorithms.sites import sites_of, working_copy
from pt2e_quant.errors import CaptureError, FileError
from tests.algorithms.frame import Pair, batches, calibrated, exported, loss_of
from tests.nets import ConvNet

HELD_BACK = batches(6)[4:]


@functools.cache
def rounded_by(name: str) -> torch.fx.GraphModule:
    algorithm = {"adaround": adaround, "blocks": reconstruct_blocks}[name]
    return algorithm(calibrated(exported(ConvNet)), batches(), steps=100)[0]


@pytest.mark.parametrize("name", ["adaround", "blocks"])
def test_outputs_of_held_back_data_come_nearer(name):
    before = loss_of(exported(ConvNet), calibrated(exported(ConvNet)), HELD_BACK)
    assert loss_of(exported(ConvNet), rounded_by(name), HELD_BACK) > before + 1.5


def test_weights_are_integers_within_the_bounds_of_the_quantizer():
    converted = convert_pt2e(rounded_by("adaround"))
    codes = [value for name, value in converted.named_buffers() if "_frozen_param" in name]
    assert [code.dtype for code in codes] == [torch.int8] * 3
    assert all(int(code.min()) >= -7 and int(code.max()) <= 7 for code in codes)


def test_bias_correction_comes_after():
    both = correct_bias(rounded_by("adaround"), batches())[0]
    assert loss_of(exported(ConvNet), both) > loss_of(exported(ConvNet), rounded_by("adaround")) - 0.2


def test_one_seed_gives_one_result():
    one, two = (adaround(calibrated(exported()), batches(), steps=20, seed=seed)[0] for seed in (0, 0))
    weights = [[value for name, value in gm.named_parameters()] for gm in (one, two)]
    assert all(map(torch.equal, *weights))


def test_finished_blocks_come_from_the_folder(tmp_path, monkeypatch):
    path, prepared = tmp_path / "done", calibrated(exported())
    first, done = adaround(prepared, batches(), steps=20, resume=path)
    monkeypatch.setattr("pt2e_quant.algorithms.reconstruction._Attempt.train", None)
    second, again = adaround(prepared, batches(), steps=20, resume=path)
    assert done == again
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    with pytest.raises(FileError, match="another job"):
        adaround(prepared, batches(), steps=21, resume=path)


@pytest.mark.parametrize("other", ["weights", "bits"])
def test_a_folder_of_another_model_is_refused(tmp_path, other):
    """Its integers would become the weights of this one."""
    path, prepared = tmp_path / "done", calibrated(exported())
    adaround(prepared, batches(), steps=1, resume=path)
    if other == "weights":
        prepared = copy.deepcopy(prepared)
        with torch.no_grad():
            next(prepared.parameters()).mul_(2)
    else:
        prepared = calibrated(exported(), weight_bits=8)
    with pytest.raises(FileError, match="another job"):
        adaround(prepared, batches(), steps=1, resume=path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("done", "cannot make the folder"),
        ("done/00000.pt", "no finished block"),
        ("done/notes.txt", "holds no finished blocks"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path, name, reason):
    if name == "done/00000.pt":
        adaround(calibrated(exported()), batches(), steps=1, resume=tmp_path / "done")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"no tensors")
    with pytest.raises(FileError, match=reason):
        adaround(calibrated(exported()), batches(), steps=1, resume=tmp_path / "done")


def test_numbers_out_of_range_are_refused():
    with pytest.raises(CaptureError, match="drop in"):
        reconstruct_blocks(calibrated(exported()), batches(), drop=1.0)


def test_blocks_follow_module_paths_and_hold_every_node_once():
    net = nn.Sequential(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    ).eval()
    x = torch.rand(3, 4)
    gm = working_copy(calibrated(torch.export.export(net, (x,)), rows=x), "the test")
    sites, _ = sites_of(gm)
    for per, names in (("block", ["0", "1"]), ("layer", ["linear", "linear_1", "linear_2"])):
        before, blocks = blocks_of(gm, sites, per)
        assert [block.name for block in blocks] == names
        assert [*before, *(node for block in blocks for node in block.nodes)] == list(gm.graph.nodes)


def test_a_residual_sum_reads_from_two_blocks_ago():
    gm = working_copy(calibrated(exported(Pair)), "the test")
    _, blocks = blocks_of(gm, sites_of(gm)[0], "layer")
    assert len(blocks[1].sources) == 1
    assert [len(block.ends) for block in blocks] == [1, 1]
