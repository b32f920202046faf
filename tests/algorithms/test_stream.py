"""A stream computes what the float model and the converted graph compute, and holds no more than what is read later."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.algorithms import adaround, choose_ranges, correct_bias
from pt2e_quant.algorithms.sites import sites_of, working_copy
from pt2e_quant.algorithms.stream import Stream
from pt2e_quant.errors import CaptureError
from quantizers.x86_inductor import X86InductorQuantizer, get_default_x86_inductor_quantization_config
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.algorithms.frame import Pair, batches, calibrated, exported, quantizer


def prepared_by(name: str) -> torch.fx.GraphModule:
    x86 = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    dynamic = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    made = {"xnnpack": quantizer(), "x86": x86, "dynamic": XNNPACKQuantizer().set_global(dynamic)}[name]
    prepared = prepare_pt2e(exported(), made)
    for batch in batches():
        prepared(*batch)
    return prepared


@pytest.mark.parametrize("name", ["xnnpack", "x86", "dynamic"])
def test_a_stream_ends_with_the_outputs_of_both_models(name):
    prepared = prepared_by(name)
    gm = working_copy(prepared, "the test")
    stream = Stream(gm, batches(), "the test")
    stream.advance(gm.graph.nodes)
    exact, converted = exported().module(), convert_pt2e(prepared)
    with torch.no_grad():
        for (batch,), (floats, rounded) in zip(batches(), stream.ends(), strict=True):
            torch.testing.assert_close(floats[0], exact(batch), rtol=1e-5, atol=1e-6)  # batch norms are folded
            assert torch.equal(rounded[0], converted(batch))


def test_a_computed_weight_is_rounded_too():
    """weight_norm: what reads it sees the norm's result rounded, as convert makes it."""
    torch.manual_seed(1)
    net, x = nn.Sequential(weight_norm(nn.Linear(6, 6)), nn.Linear(6, 3)).eval(), torch.rand(5, 6)
    prepared = calibrated(torch.export.export(net, (x,)), rows=x)
    gm = working_copy(prepared, "the test")
    assert "computed by" in next(iter(sites_of(gm)[1].values()))
    stream = Stream(gm, [(x,)], "the test")
    stream.advance(gm.graph.nodes)
    with torch.no_grad():
        assert torch.equal(next(stream.ends())[1][0], convert_pt2e(prepared)(x))


def test_a_stream_holds_what_is_read_later():
    gm = working_copy(calibrated(exported()), "the test")
    stream = Stream(gm, batches(), "the test")
    most = []
    stream.advance(gm.graph.nodes, lambda node: most.append(len(stream.lanes[0].rounded)))
    assert max(most) <= 4  # relu, its observer, and one path beside the other
    assert len(stream.lanes[0].rounded) == 0


def test_what_is_no_site_has_a_reason():
    sites, reasons = sites_of(working_copy(calibrated(exported()), "the test"))
    assert [site.node.name for site in sites] == ["conv2d", "conv2d_1"]
    assert set(reasons.values()) == {"other operators read its weight too"}


def test_a_float_or_converted_graph_is_refused():
    for model in (exported(Pair).module(), convert_pt2e(calibrated(exported()))):
        with pytest.raises(CaptureError, match="takes what prepare_pt2e returned"):
            working_copy(model, "the test")


class Chooses(nn.Module):
    """A linear, and one of two others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, self.left, self.right, (self.first(x),))


class Counts(nn.Module):
    """A linear whose result depends on how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) * self.calls


@pytest.mark.parametrize(("kind", "message"), [(Chooses, "nested graphs"), (Counts, "writes to its buffers")])
def test_graphs_whose_values_cannot_be_streamed_are_refused(kind, message):
    torch.manual_seed(0)
    x = torch.rand(3, 4)
    with torch.no_grad():
        program = torch.export.export(kind().eval(), (x,))
    with pytest.raises(CaptureError, match=message):
        working_copy(calibrated(program, rows=x), "the test")


def test_bfloat16_is_rounded_like_the_converted_graph():
    """Within one step of the type, 2 ** -8: kernels may round between the dequantize and the product."""
    torch.manual_seed(1)
    net, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval().bfloat16(), torch.rand(3, 8).bfloat16()
    prepared = calibrated(torch.export.export(net, (x,)), rows=x)
    gm = working_copy(prepared, "the test")
    stream = Stream(gm, [(x,)], "the test")
    stream.advance(gm.graph.nodes)
    with torch.no_grad():
        torch.testing.assert_close(next(stream.ends())[1][0], convert_pt2e(prepared)(x), rtol=2**-7, atol=2**-8)
    for algorithm in (correct_bias, partial(adaround, steps=5), choose_ranges):
        assert convert_pt2e(algorithm(prepared, [(x,)])[0])(x).dtype is torch.bfloat16
