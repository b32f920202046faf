"""Every quantizer trains: ours with is_qat=True, and those of torchao and ExecuTorch as they are."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pt2e_quant import check_converted, convert_pt2e, explain, prepare_pt2e, prepare_qat_pt2e
from pt2e_quant.errors import CoverageError
from pt2e_quant.fake_quantize import is_fake_quantizer
from pt2e_quant.quantizer import FixedQParamsQuantizationSpec
from quantizers.arm_inductor import ArmInductorQuantizer, get_default_arm_inductor_quantization_config
from quantizers.decoder import get_decoder_quantizer
from quantizers.embedding import EmbeddingQuantizer, get_embedding_config
from quantizers.x86_inductor import X86InductorQuantizer, get_default_x86_inductor_quantization_config
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from quantizers.xpu_inductor import (
    XPUInductorQuantizer,
    get_default_xpu_inductor_quantization_config,
    get_xpu_inductor_symm_quantization_config,
)
from tests.nets import ConvNet, export
from tests.pt2e.kit import ByHand, annotate, the_call
from tests.qat.kit import images, settle, sgd


class Words(nn.Module):
    """A table, a linear, a table tied to nothing: what decoders quantize."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 64)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 32, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.table(tokens))))


class Chain(nn.Module):
    """conv - norm - relu and conv - norm without a bias, then a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, eps=1e-3, momentum=0.03)
        self.second, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.second(torch.relu(self.norm(self.first(x)))))
        return self.head(x.mean((2, 3)))


def conv_batches() -> list[Tensor]:
    return [images(seed, 6, 3, 16, 16) for seed in range(4)]


def word_batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 20, (3, 5), generator=generator) for _ in range(4)]


Make = Callable[[bool], Any]
IMAGES: dict[str, Make] = {
    "xnnpack": lambda qat: XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_qat=qat)),
    "xnnpack, per channel": lambda qat: XNNPACKQuantizer().set_global(get_symmetric_quantization_config(True, qat)),
    "x86": lambda qat: X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(qat)),
    "x86, reduced": lambda qat: X86InductorQuantizer().set_global(
        get_default_x86_inductor_quantization_config(qat, reduce_range=True)
    ),
    "arm": lambda qat: ArmInductorQuantizer().set_global(get_default_arm_inductor_quantization_config(qat)),
    "xpu": lambda qat: XPUInductorQuantizer().set_global(get_default_xpu_inductor_quantization_config(qat)),
    "xpu, symmetric": lambda qat: XPUInductorQuantizer().set_global(get_xpu_inductor_symm_quantization_config(qat)),
}
WORDS: dict[str, Make] = {
    "xnnpack, dynamic": lambda qat: XNNPACKQuantizer().set_global(
        get_symmetric_quantization_config(True, qat, is_dynamic=True)
    ),
    "x86, dynamic": lambda qat: X86InductorQuantizer().set_global(
        get_default_x86_inductor_quantization_config(qat, is_dynamic=True)
    ),
    "arm, dynamic": lambda qat: ArmInductorQuantizer().set_global(
        get_default_arm_inductor_quantization_config(qat, is_dynamic=True)
    ),
    "embedding": lambda qat: EmbeddingQuantizer(get_embedding_config(is_qat=qat)),
    "embedding of 4 bits in groups": lambda qat: EmbeddingQuantizer(get_embedding_config(4, 16, qat)),
    "decoder": lambda qat: get_decoder_quantizer(is_qat=qat),
    "decoder, 8-bit table": lambda qat: get_decoder_quantizer(embedding_bits=8, is_qat=qat),
}
CASES = [(name, make, ConvNet, conv_batches) for name, make in IMAGES.items()]
CASES += [(name, make, Words, word_batches) for name, make in WORDS.items()]


def quantized(gm: GraphModule) -> list[tuple[str, str | None]]:
    return [(decision.node, decision.rule) for decision in explain(gm).record.quantized]


def check(program: torch.export.ExportedProgram, quantizer: Any, data: list[Tensor], **kwargs: Any) -> GraphModule:
    """Trains, rounds all that it watches, and converts to what it trained."""
    graph = prepare_qat_pt2e(program, quantizer, **kwargs).train()
    observers = [module for name, module in graph.named_children() if name.startswith("activation_post_process")]
    assert observers
    assert all(map(is_fake_quantizer, observers))
    losses = sgd(graph, data * 2)
    assert losses[-1] < losses[0]
    check_converted(settle(graph), convert_pt2e(graph), data)
    return graph


@pytest.mark.parametrize(("make", "model", "data"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_ours_quantize_what_they_do_for_calibration_and_convert_to_what_they_trained(make, model, data):
    program = export(model(), data()[0])
    graph = check(program, make(True), data())
    assert quantized(graph) == quantized(prepare_pt2e(program, make(False)))


def test_a_configuration_for_calibration_is_refused():
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config())
    with pytest.raises(CoverageError, match=r"observers alone.*\(is_qat=True\)"):
        prepare_qat_pt2e(export(ConvNet(), conv_batches()[0]), quantizer)


def test_what_has_fixed_qparams_is_rounded_in_training():
    def function(gm: GraphModule) -> None:
        annotate(the_call(gm, torch.ops.aten.sigmoid.default), {}, FixedQParamsQuantizationSpec(torch.uint8, 1 / 16, 0))

    graph = prepare_qat_pt2e(export(nn.Sigmoid(), torch.randn(50)), ByHand(function))
    x = torch.linspace(-3, 3, 50)
    assert torch.equal(graph(x), (torch.sigmoid(x) * 16).round() / 16)  # 1 / 16 is exact
    assert torch.equal(convert_pt2e(graph)(x), graph(x))


# --- of other packages ------------------------------------------------------------------------------------------------


def torchaos_x86() -> Any:
    module = importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    config = module.get_default_x86_inductor_quantization_config(is_qat=True)
    return module.X86InductorQuantizer().set_global(config)


def executorchs_xnnpack() -> Any:
    module = importlib.import_module("executorch.backends.xnnpack.quantizer.xnnpack_quantizer")
    config = module.get_symmetric_quantization_config(is_per_channel=True, is_qat=True)
    return module.XNNPACKQuantizer().set_global(config)


XNNPACKS = pytest.param("executorch", executorchs_xnnpack, True, marks=pytest.mark.slow)  # it exports its patterns


@pytest.mark.parametrize(
    ("needs", "make", "train"), [("torchao", torchaos_x86, True), ("torchao", torchaos_x86, False), XNNPACKS]
)
def test_those_of_other_packages_train_as_they_are(needs, make, train):
    pytest.importorskip(needs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # while they load and annotate
        program = export(Chain(), conv_batches()[0], train=train, strict=True)  # they look for source functions
        graph = check(program, make(), conv_batches(), calibration=None if train else conv_batches())
    layers = [name for name, _ in quantized(graph) if name.startswith(("conv2d", "linear"))]
    assert layers == ["conv2d", "conv2d_1", "linear"]
