"""choose_ranges: an outlier is cut where that helps the next layer, and kept where the next layer needs it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.algorithms import choose_ranges
from pt2e_quant.observer import HistogramObserver, MinMaxObserver
from pt2e_quant.quantizer import QuantizationConfig
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.algorithms.frame import batches, calibrated, exported, loss_of
from tests.nets import ConvNet


def with_outlier(weight: float) -> tuple[torch.export.ExportedProgram, list[tuple[Tensor]]]:
    """A linear whose input has one large value in its first channel, read with this weight."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 4)).eval()
    with torch.no_grad():
        net[0].weight[:, 0] = weight
    x = torch.rand(64, 8)
    x[0, 0] = 100.0
    return torch.export.export(net, (x,)), [(x,)]


def observed_by(observer: type) -> QuantizationConfig:
    config = get_symmetric_quantization_config(is_per_channel=True)
    spec = type(config.input_activation)(
        torch.int8, observer, quant_min=-128, quant_max=127, qscheme=torch.per_tensor_affine
    )
    return QuantizationConfig(spec, None, config.weight, config.bias)


@pytest.mark.parametrize(("weight", "cut"), [(0.0, True), (1.0, False)])
def test_an_outlier_is_cut_where_nobody_looks_at_it(weight, cut):
    program, data = with_outlier(weight)
    prepared = prepare_pt2e(program, XNNPACKQuantizer().set_global(observed_by(HistogramObserver)))
    prepared(*data[0])
    chosen, (done,) = choose_ranges(prepared, data)
    assert (done.high < 60) is cut
    assert loss_of(program, chosen, data) >= loss_of(program, prepared, data)


def test_an_observer_without_counts_has_candidates_too():
    program, data = with_outlier(0.0)
    prepared = prepare_pt2e(program, XNNPACKQuantizer().set_global(observed_by(MinMaxObserver)))
    prepared(*data[0])
    _, (done,) = choose_ranges(prepared, data)
    assert done.choice == "0.5 of the range"
    assert done.gain > 3  # steps of half the size: a fourth of the error


def test_every_tensor_of_a_net_is_decided_and_none_gets_worse_behind_it():
    prepared = calibrated(exported(ConvNet), 8, 4)
    chosen, done = choose_ranges(prepared, batches())
    assert [one.tensor for one in done] == ["x", "relu_", "hardtanh", "mean_dim", "linear"]
    assert all(one.gain >= 1 for one in done)
    assert convert_pt2e(chosen)(*batches()[0]).shape == (8, 5)


@pytest.mark.parametrize(("nearer_in", "cut"), [(4, True), (3, False)])
def test_a_range_has_to_be_better_on_each_batch(nearer_in, cut):
    """Of four batches, one reads the outlier or none does: cut, it would be the error of that one."""
    program, ((x,),) = with_outlier(1e-3)
    ordinary = x.clone()
    ordinary[0, 0] = 1.0
    prepared = prepare_pt2e(program, XNNPACKQuantizer().set_global(observed_by(HistogramObserver)))
    prepared(x)
    extreme = ordinary.clone()
    extreme[:, 0] = 100.0
    _, (done,) = choose_ranges(prepared, [(ordinary,)] * nearer_in + [(extreme * 10,)] * (4 - nearer_in))
    assert (done.high < 60) is cut
