"""suggest: what it says of a model, and that what it applies is never worse on data that it held back."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import nn

from pt2e_quant import convert_pt2e
from pt2e_quant.algorithms import Advice, suggest
from quantizers.xnnpack import XNNPACKQuantizer, get_8da4w_config
from tests.algorithms.frame import batches, calibrated, exported, quantizer
from tests.algorithms.test_stream import Counts
from tests.nets import ConvNet, export, sqnr


@functools.cache
def advice() -> Advice:
    return suggest(exported(ConvNet), quantizer(), batches(8))


def test_sites_come_by_their_own_error_with_what_was_seen():
    found = advice().suggestions
    assert [one.own for one in found] == sorted(one.own for one in found)
    assert {"gptq", "correct_bias"} <= {one.algorithm for one in found}
    assert any("a weight with 15 integers: gptq" in line for line in advice().text().splitlines())


def test_every_site_has_an_own_error_also_where_all_tensors_are_observed():
    """Observers of a prepared graph hide the ops behind them: the float model is what is compared with."""
    for net in (nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))):
        data = [(torch.rand(8, 4),) for _ in range(4)]
        found = suggest(torch.export.export(net.eval(), data[0]), quantizer(), data).suggestions
        assert found
        assert all(math.isfinite(one.own) for one in found)


def test_what_is_applied_is_kept_where_it_helps():
    advised = advice().apply(thorough=False)
    assert advised.value > advice().plain + 8  # means are most of the error of this net
    assert advised.value == max(one.value for one in advised.tried)
    assert advised.tried[0].value == advice().plain


def test_the_order_is_from_cheap_to_dear_and_time_ends_it():
    assert [one.algorithm for one in advice().apply(seconds=0).tried] == ["plain"]


def test_channels_of_different_size_in_one_scale_ask_for_equalization():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    with torch.no_grad():
        net[0].weight *= torch.logspace(-2, 1, 8).reshape(-1, 1, 1, 1)
    found = suggest(export(net, *batches()[0]), quantizer(8, per_channel=False), batches()).suggestions
    assert [one.node for one in found if one.algorithm == "equalize"] == ["conv2d"]


def test_a_metric_of_the_caller_decides():
    """One that likes no change keeps plain quantization."""
    made = []

    def first_is_best(model: torch.fx.GraphModule) -> float:
        made.append(model)
        return -float(len(made))

    advised = suggest(exported(ConvNet), quantizer(), batches(), metric=first_is_best).apply(thorough=False)
    assert [one.kept for one in advised.tried] == [True, *[False] * (len(made) - 1)]


def test_an_algorithm_that_refuses_the_model_is_told_and_the_others_go_on():
    net, x = Counts().eval(), torch.rand(3, 4)
    advised = suggest(torch.export.export(net, (x,)), quantizer(8), [(x,)]).apply()
    refused = {one.algorithm for one in advised.tried if "writes to its buffers" in (one.reason or "")}
    assert refused == {"choose_ranges", "adaround", "reconstruct_blocks", "correct_bias"}
    assert advised.value >= advised.tried[0].value


class Moody(XNNPACKQuantizer):
    """A foreign quantizer that fails on its second graph, in its own way."""

    calls = 0

    def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
        self.calls += 1
        if self.calls == 2:
            raise ZeroDivisionError("no operators\nat all")
        return super().annotate(model)


def test_an_error_of_a_foreign_quantizer_ends_one_step_alone():
    moody = Moody().set_global(quantizer().global_config)
    advised = suggest(exported(), moody, batches()).apply(thorough=False)
    (failed,) = [one for one in advised.tried if one.reason]
    assert failed.algorithm == "equalize"
    assert "no operators" in failed.reason
    assert [one.algorithm for one in advised.tried[-1:]] == ["correct_bias"]


def test_weights_of_few_bits_get_the_algorithms_that_round_them():
    """Those of 8 bits have nothing to gain there."""
    names = {
        bits: {one.algorithm for one in suggest(exported(), quantizer(bits), batches()).apply().tried}
        for bits in (4, 8)
    }
    assert names[4] - names[8] == {"awq", "clip_weights", "gptq"}


def test_weights_alone_are_rounded_for_what_layers_return():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    mixed = torch.randn(64, 64)
    data = [(torch.randn(32, 64) @ mixed,) for _ in range(8)]  # channels that go together
    advised = suggest(
        torch.export.export(net, data[0]), XNNPACKQuantizer().set_global(get_8da4w_config()), data
    ).apply()
    kept = {one.algorithm: one.value for one in advised.tried if one.kept}
    assert kept["gptq"] > kept["plain"] + 2.0


def test_a_rotation_is_tried_where_there_is_a_stream():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(20, 32), nn.RMSNorm(32), nn.Linear(32, 8)).eval()
    data = [(torch.randint(0, 20, (2, 5)),) for _ in range(4)]
    advised = suggest(torch.export.export(net, data[0]), quantizer(), data).apply(thorough=False)
    assert "rotate" in [one.algorithm for one in advised.tried]


def test_of_few_batches_the_last_is_held_back():
    (calibration,), (held,) = batches(2)
    prepared = calibrated(exported(), rows=calibration)
    with torch.no_grad():
        expected = sqnr(exported().module()(held), convert_pt2e(prepared)(held))
    assert suggest(exported(), quantizer(), batches(2)).plain == pytest.approx(
        expected, abs=1e-3
    )  # sums in another order
