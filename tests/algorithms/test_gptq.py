"""gptq: the algorithm by hand, less error than rounding to the nearest, in groups and convolutions; repeatable."""

from __future__ import annotations

import copy
import functools
import itertools
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.algorithms import awq, clip_weights, gptq
from pt2e_quant.algorithms.input_moments import InputMoments
from pt2e_quant.algorithms.sites import sites_of, static_grid
from pt2e_quant.errors import CalibrationError, CaptureError, FileError
from quantizers.xnnpack import XNNPACKQuantizer, get_8da4w_config
from tests.algorithms.frame import Pair, batches, calibrated, exported, loss_of
from tests.nets import ConvNet

HELD_BACK = batches(6)[4:]


def correlated(rows: int, seed: int = 2) -> Tensor:
    """64 inputs that follow from 12, as those inside of a net do."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(12, 64, generator=torch.Generator().manual_seed(7))
    return torch.randn(rows, 12, generator=generator) @ mixing + 0.1 * torch.randn(rows, 64, generator=generator)


@functools.cache
def in_groups() -> torch.fx.GraphModule:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32)).eval()
    return prepare_pt2e(torch.export.export(net, (correlated(512),)), XNNPACKQuantizer().set_global(get_8da4w_config()))


@functools.cache
def rounded_in_groups(act_order: bool) -> torch.fx.GraphModule:
    return gptq(in_groups(), [(correlated(512),)], act_order=act_order)[0]


def by_the_paper(weight: Tensor, scale: Tensor, x: Tensor, damp: float) -> Tensor:
    """Column by column with the inverse of what is left, which is how the paper derives its algorithm (equation 2)."""
    weight, scale, hessian = weight.double().clone(), scale.double(), (x.T @ x).double()
    hessian += damp * hessian.diagonal().mean() * torch.eye(len(hessian))
    for at in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian[at:, at:])
        new = (weight[:, at] / scale[:, at]).round().clamp(-8, 7) * scale[:, at]
        error = (weight[:, at] - new) / inverse[0, 0]
        weight[:, at:] -= error[:, None] * inverse[0]
        weight[:, at] = new
    return weight


def test_weights_are_those_of_the_papers_equations():
    net = nn.Linear(64, 8, bias=False).eval()
    x = (10 * correlated(256)).round().clamp(-128, 127)
    x[:, :2] = torch.tensor([-128.0, 127.0])  # so that rounding each row to 8 bits, with steps of 1, changes nothing
    prepared = prepare_pt2e(torch.export.export(net, (x,)), XNNPACKQuantizer().set_global(get_8da4w_config()))
    found = gptq(prepared, [(x,)], act_order=False, asymmetric=False)[0]
    site = sites_of(found)[0][0]
    scale = static_grid(found, site, net.weight).scale.repeat_interleave(32, 1)
    wanted = by_the_paper(net.weight.detach(), scale, x, 0.01)
    same = ((found.get_parameter(site.weight.target) - wanted).abs() < 0.5 * scale).float().mean()
    assert same > 0.99  # halves between two integers may fall to either side in float32


@pytest.mark.parametrize("act_order", [True, False])
def test_groups_lose_less_on_held_back_data(act_order):
    program = in_groups()
    exact = program(correlated(512, seed=3))  # observers of weights let them pass
    nearest, found = (convert_pt2e(one)(correlated(512, seed=3)) for one in (program, rounded_in_groups(act_order)))
    assert (found - exact).square().sum() < 0.5 * (nearest - exact).square().sum()


def test_scales_that_a_backend_stores_in_bfloat16_stay_so():
    found = rounded_in_groups(True)
    for site in sites_of(found)[0]:
        scale = static_grid(found, site, found.get_parameter(site.weight.target)).scale
        assert torch.equal(scale, scale.bfloat16().float())


def test_convert_finds_the_integers_that_were_chosen():
    found = rounded_in_groups(True)
    codes = [value for name, value in convert_pt2e(found).named_buffers() if "_frozen_param" in name]
    for site, code in zip(sites_of(found)[0], [code for code in codes if code.dtype is torch.int8], strict=True):
        weight = found.get_parameter(site.weight.target)
        steps = static_grid(found, site, weight).scale.repeat_interleave(32, 1)
        assert torch.equal(code * steps, weight)


@pytest.mark.parametrize("kind", [ConvNet, Pair])
def test_convolutions_of_every_form_lose_less(kind):
    before = calibrated(exported(kind))
    found, done = gptq(before, batches())
    assert all(one.gain > 1 for one in done if one.reason is None)
    assert loss_of(exported(kind), found, HELD_BACK) > loss_of(exported(kind), before, HELD_BACK)


def test_a_transposed_convolution_is_left_alone():
    net = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.Conv2d(4, 4, 1)).eval()
    done = gptq(calibrated(torch.export.export(net, batches()[0])), batches())[1]
    assert [one.reason for one in done] == ["it is a transposed convolution", None]


def test_finished_layers_come_from_the_folder(tmp_path, monkeypatch):
    path = tmp_path / "done"
    first, done = gptq(calibrated(exported()), batches(), resume=path)
    monkeypatch.setattr(InputMoments, "power", None)
    second, again = gptq(calibrated(exported()), batches(), resume=path)
    assert done == again
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    with pytest.raises(FileError, match="another job"):
        gptq(calibrated(exported()), batches(), damp=0.02, resume=path)


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    """SIGKILL while the second layer is being written: the first is not computed again, and the result is the same."""
    path, whole = tmp_path / "done", gptq(calibrated(exported()), batches())[0]
    child = multiprocessing.get_context("fork").Process(target=_killed_at_the_second_layer, args=(path,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    kept = [one.name for one in path.glob("*.pt")]
    assert kept == ["00000.pt"]
    before = (path / kept[0]).stat().st_mtime_ns
    resumed = gptq(calibrated(exported()), batches(), resume=path)[0]
    assert (path / kept[0]).stat().st_mtime_ns == before
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))


def _killed_at_the_second_layer(path: Path) -> None:
    torch.set_num_threads(1)
    fsync, calls = os.fsync, itertools.count()

    def killing(number: int) -> None:  # of the job, of the first layer, then of the second
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(number)

    os.fsync = killing
    gptq(calibrated(exported()), batches(), resume=path)


def test_bfloat16_models_come_nearer_too():
    torch.manual_seed(0)
    net = nn.Linear(64, 32).eval().bfloat16()
    x = correlated(512).bfloat16()
    prepared = prepare_pt2e(torch.export.export(net, (x,)), XNNPACKQuantizer().set_global(get_8da4w_config()))
    found, (done,) = gptq(prepared, [(x,)])
    assert done.gain > 2
    assert sites_of(found)[0][0].weight.meta["val"].dtype is torch.bfloat16


def test_numbers_out_of_range_are_refused():
    with pytest.raises(CaptureError, match="damp must be in"):
        gptq(calibrated(exported()), batches(), damp=0.0)


def test_inputs_that_are_not_finite_are_named():
    program, x = in_groups(), correlated(512)
    x[3, 5] = float("inf")
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        gptq(program, [(x,)])


def test_the_float_models_outputs_are_a_better_goal_than_the_own_weight():
    exact = in_groups()(correlated(512, seed=3))
    own = gptq(in_groups(), [(correlated(512),)], asymmetric=False)[0]
    errors = [convert_pt2e(one)(correlated(512, seed=3)) - exact for one in (own, rounded_in_groups(True))]
    assert errors[1].square().sum() < errors[0].square().sum()


def test_clipping_for_the_data_loses_less_and_leaves_weights_for_gptq():
    found, done = clip_weights(in_groups(), [(correlated(512),)])
    assert all(one.gain > 1.02 for one in done)
    kept = dict(in_groups().named_parameters())
    assert all(torch.equal(value, kept[name]) for name, value in found.named_parameters())
    exact = in_groups()(correlated(512, seed=3))
    errors = [convert_pt2e(one)(correlated(512, seed=3)) - exact for one in (in_groups(), found)]
    assert errors[1].square().sum() < errors[0].square().sum()
    assert all(one.gain > 1.5 for one in gptq(found, [(correlated(512),)])[1])


@pytest.mark.parametrize("rows", [[80], [10] * 8], ids=["one batch", "several"])
def test_few_inputs_are_not_learned_by_heart(rows):
    """As many inputs as channels: least squares would fit the rounding of just these, and lose on others."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))).eval()
    data, other = [(torch.randn(count, 64),) for count in rows], [(torch.randn(512, 64),)]
    program = torch.export.export(net, (torch.randn(4, 64),), dynamic_shapes=({0: torch.export.Dim("rows")},))
    prepared = calibrated(program, 8, 6, torch.randn(512, 64))
    both = {aimed: gptq(prepared, data, asymmetric=aimed)[0] for aimed in (True, False)}
    assert loss_of(program, both[True], other) > loss_of(program, both[False], other) - 0.3


def test_a_consumed_model_lets_go_of_each_weight_that_was_replaced():
    prepared = copy.deepcopy(in_groups())
    rounded, done = gptq(prepared, [(correlated(512),)], consume=True)
    assert all(one.reason is None for one in done)
    assert {tuple(value.shape) for name, value in prepared.named_parameters() if name.endswith("weight")} == {(0,)}
    kept = dict(rounded_in_groups(True).named_parameters())
    assert all(torch.equal(value, kept[name]) for name, value in rounded.named_parameters())


def test_awq_spares_channels_that_carry_much():
    torch.manual_seed(0)
    net = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 32)).eval()
    with torch.no_grad():
        net[0].weight[::32] = 20.0
        net[1].weight.normal_()  # of uniform ones the largest of a group is everywhere, and nothing is gained
    program = torch.export.export(net, (correlated(512),))
    quantizer = XNNPACKQuantizer().set_global(get_8da4w_config())
    scaled, (done,) = awq(program, quantizer, [(correlated(512),)])
    assert done.folded_into == "layer_norm"
    torch.testing.assert_close(scaled(correlated(512)), net(correlated(512)))
    exact = net(correlated(512, seed=3))
    before, after = (
        (convert_pt2e(prepare_pt2e(one, quantizer))(correlated(512, seed=3)) - exact).square().sum()
        for one in (program, scaled)
    )
    assert after < 0.7 * before
