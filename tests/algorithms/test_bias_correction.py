"""correct_bias: the means of errors are gone, in the order of the graph, and the caller's model stays as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.algorithms import correct_bias
from pt2e_quant.errors import CalibrationError
from tests.algorithms.frame import batches, calibrated, exported, loss_of, quantizer
from tests.nets import ConvNet


@pytest.mark.parametrize("sequential", [True, False])
def test_correction_brings_the_outputs_nearer(sequential):
    """A net of a depthwise and other convolutions with weights of 4 bits: 25.7 dB become 39.4."""
    program = exported(ConvNet)
    prepared = calibrated(program)
    before = loss_of(program, prepared)
    corrected, _ = correct_bias(prepared, batches(), sequential=sequential)
    assert loss_of(program, corrected) > before + 10
    assert loss_of(program, prepared) == before


def test_the_mean_of_the_error_of_a_channel_is_zero():
    """One linear: the mean error is what the bias takes, so that its float32 rounding is left: 1e-6."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5)).eval()
    data = [(torch.rand(16, 3),), (torch.rand(16, 3),)]
    program = torch.export.export(net, data[0])
    config = quantizer().global_config
    outputs_in_float = quantizer().set_global(type(config)(config.input_activation, None, config.weight, config.bias))
    prepared = prepare_pt2e(program, outputs_in_float)
    for batch in data:
        prepared(*batch)
    corrected, (done,) = correct_bias(prepared, data)
    converted = convert_pt2e(corrected)
    error = torch.cat([converted(*batch) - net(*batch) for batch in data])
    assert error.mean(0).abs().max() < 1e-6
    assert 0.1 < done.share <= 1


def test_an_op_without_a_bias_gets_one_and_a_shared_weight_is_left_alone():
    corrected, done = correct_bias(calibrated(exported()), batches())
    assert [one.node for one in done] == ["conv2d", "conv2d_1", "linear", "linear_1"]
    assert [one.reason for one in done] == [None, None, *["other operators read its weight too"] * 2]
    conv = next(node for node in corrected.graph.nodes if node.name == "conv2d_1")
    assert conv.args[2] is not None


def test_correction_takes_data():
    with pytest.raises(CalibrationError, match="no batch"):
        correct_bias(calibrated(exported()), [])
