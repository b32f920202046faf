"""What was trained runs in integers in the real runtime, as the prepared model in evaluation says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pt2e_quant import check_converted, convert_pt2e, prepare_qat_pt2e
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.nets import export
from tests.qat.kit import images, settle, sgd

pytest.importorskip("executorch")


def test_a_trained_model_runs_on_xnnpack_in_integers():
    from pt2e_quant.lowering.executorch import lower_to_executorch

    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, eps=1e-3, momentum=0.03), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6(), nn.Dropout(0.15),
        nn.Flatten(), nn.Linear(8 * 36, 5), nn.BatchNorm1d(5),
    )  # fmt: skip
    x = images(1, 2, 3, 8, 8)
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(True, is_qat=True))
    graph = prepare_qat_pt2e(export(model, x, train=True), quantizer)
    sgd(graph, [images(seed, 2, 3, 8, 8) for seed in range(6)])
    converted = convert_pt2e(settle(graph))
    check_converted(graph, converted, [x])
    program = lower_to_executorch(torch.export.export(converted, (x,)))
    assert program.delegates == 1
    assert program.undelegated == ()
    assert {kernel.precision for kernel in program.kernels} == {"int8"}
    assert [kernel.node for kernel in program.kernels if "conv" in kernel.node or "linear" in kernel.node] == [
        "conv2d", "conv2d_1", "linear",
    ]  # fmt: skip
    (got,) = program.run(x)
    step = float(converted.graph.output_node().args[0][0].args[1])
    assert float((got - graph(x)).detach().abs().max()) <= 1.01 * step  # kernels may round a tie the other way
