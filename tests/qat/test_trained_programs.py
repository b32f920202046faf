"""What was trained runs in integers in the real runtime, as the prepared model in evaluation says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from demo.model import DigitsNet, Images, load_images, train
from pt2e_quant import check_converted, convert_pt2e, prepare_qat_pt2e
from pt2e_quant.quantizer import Quantizer
from quantizers.x86_inductor import X86InductorQuantizer, get_default_x86_inductor_quantization_config
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


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Images, Images]:
    torch.manual_seed(0)
    model = DigitsNet(16)
    learn, held_back = load_images()
    train(model, learn, 10)
    return model, learn, held_back


def trained(digits: tuple[nn.Module, Images, Images], quantizer: Quantizer) -> GraphModule:
    model, learn, _ = digits
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(model, (learn.x[:2],), dynamic_shapes=({0: batch},))
    graph = prepare_qat_pt2e(program, quantizer, calibration=learn.x[:256].split(64)).train()
    train(graph, learn, 2, lr=1e-3)
    return graph


def accuracy(outputs: Tensor, images: Images) -> float:
    return (outputs.argmax(1) == images.y).double().mean().item() * 100


POINTS = 0.2  # one image of 597, the bound of the issue
LAYERS = 8  # seven convolutions and a linear


@pytest.mark.slow
def test_a_trained_net_is_as_right_on_xnnpack_as_it_was_in_training(digits):
    from pt2e_quant.lowering.executorch import lower_to_executorch

    config = get_symmetric_quantization_config(True, is_qat=True)
    graph, held_back = trained(digits, XNNPACKQuantizer().set_global(config)), digits[2]
    program = lower_to_executorch(convert_pt2e(graph), (held_back.x[:1],), dynamic_shapes=({},))
    assert (program.delegates, program.undelegated) == (1, ())
    assert {kernel.precision for kernel in program.kernels} == {"int8"}
    layers = [kernel for kernel in program.kernels if "conv" in kernel.node or "linear" in kernel.node]
    assert len(layers) == LAYERS
    outputs = torch.cat([program.run(image)[0].clone() for image in held_back.x.split(1)])
    assert accuracy(outputs, held_back) == pytest.approx(accuracy(graph(held_back.x), held_back), abs=POINTS)


@pytest.mark.slow
def test_a_trained_net_is_as_right_through_inductor_as_it_was_in_training(digits):
    from pt2e_quant.lowering.inductor import lower_to_inductor

    config = get_default_x86_inductor_quantization_config(is_qat=True)
    graph, held_back = trained(digits, X86InductorQuantizer().set_global(config)), digits[2]
    program = lower_to_inductor(convert_pt2e(graph))
    layers = [kernel for kernel in program.kernels if "conv" in kernel.op or "linear" in kernel.op]
    assert [kernel.precision for kernel in layers] == ["int8"] * LAYERS
    outputs = program(held_back.x)
    assert accuracy(outputs, held_back) == pytest.approx(accuracy(graph(held_back.x), held_back), abs=POINTS)
