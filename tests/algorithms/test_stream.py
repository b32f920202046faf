"""A stream computes what the float model and the converted graph compute, and holds no more than what is read later."""

from __future__ import annotations

import pytest
import torch

from pt2e_quant import convert_pt2e, prepare_pt2e
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
