"""Observers with a `convert(model, node)` of their own write their own q/dq, here as in torchao."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.errors import CalibrationError
from tests.foreign.test_same_as_the_peer import even_out, theirs
from tests.nets import MLP
from tests.peer.canonical import differences

pytest.importorskip("torchao")

from torchao.quantization.pt2e import MappingType, PerAxis, PerBlock, PerGroup, PerTensor, PerToken
from torchao.quantization.pt2e import _affine_quantization as affine
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

pytestmark = pytest.mark.filterwarnings(r"ignore:::torchao\.")

aten = torch.ops.aten

X = torch.randn(4, 10, generator=torch.Generator().manual_seed(1))
BATCHES = ((X,), (2 * X,), (X - 1,))


def spec(kind: str, granularity: Any, *, symmetric: bool = False, dynamic: bool = False) -> QuantizationSpec:
    """8 bits with bounds and eps that are nobody's default."""
    mapping = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
    constructor = getattr(affine, kind).with_args(
        mapping_type=mapping,
        target_dtype=torch.int8,
        granularity=granularity,
        eps=2**-13,
        scale_dtype=torch.float32,
        zero_point_dtype=torch.int32,
        **{"is_dynamic": True} if dynamic else {},
    )
    return QuantizationSpec(torch.int8, constructor, -120, 115, is_dynamic=dynamic)


class Linears(Quantizer):
    """Gives all linears one spec for the input, one for the weight; either may be None."""

    def __init__(self, activation: QuantizationSpec | None, weight: QuantizationSpec | None) -> None:
        self.activation, self.weight = activation, weight

    def annotate(self, model: GraphModule) -> GraphModule:
        for node in model.graph.find_nodes(op="call_function", target=aten.linear.default):
            specs = {node.args[0]: self.activation, node.args[1]: self.weight}
            node.meta["quantization_annotation"] = QuantizationAnnotation(specs, _annotated=True)
        return model

    def validate(self, model: GraphModule) -> None:
        pass


QUANTIZERS = {
    "groups of weights": (None, spec("AffineQuantizedMinMaxObserver", PerGroup(2), symmetric=True)),
    "blocks of weights": (None, spec("AffineQuantizedMinMaxObserver", PerBlock((2, 2)))),
    "channels": (
        spec("AffineQuantizedMinMaxObserver", PerTensor()),
        spec("AffineQuantizedMinMaxObserver", PerAxis(0), symmetric=True),
    ),
    "average over batches": (
        spec("AffineQuantizedMovingAverageMinMaxObserver", PerTensor()),
        spec("AffineQuantizedMinMaxObserver", PerTensor()),
    ),
    "tokens at run time": (
        spec("AffineQuantizedPlaceholderObserver", PerToken(), dynamic=True),
        spec("AffineQuantizedMinMaxObserver", PerGroup(2), symmetric=True),
    ),
}


@pytest.fixture(params=QUANTIZERS, ids=lambda name: name)
def quantizer(request: pytest.FixtureRequest) -> Linears:
    return Linears(*QUANTIZERS[request.param])


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    torch.manual_seed(0)
    return torch.export.export(MLP().eval(), (X,))


def ours(program: torch.export.ExportedProgram, quantizer: Linears) -> GraphModule:
    prepared = prepare_pt2e(program, quantizer)
    for batch in BATCHES:
        prepared(*batch)
    return convert_pt2e(prepared)


def foreign_ops(gm: GraphModule, name: str) -> list[Node]:
    return [node for node in gm.graph.nodes if str(node.target) == f"torchao.{name}.default"]


def test_they_write_what_torchao_writes(program, quantizer):
    one, other = ours(program, quantizer), theirs(program, BATCHES, quantizer)
    even_out(other)
    assert differences(one, other) == []
    assert len(foreign_ops(one, "dequantize_affine")) == 2 * (1 + (quantizer.activation is not None))
    for batch in BATCHES:
        assert torch.equal(one(*batch), other(*batch))


def test_weights_are_stored_as_integers(program, quantizer):
    converted = ours(program, quantizer)
    assert [tuple(tensor.shape) for tensor in converted.state_dict().values() if tensor.dtype is torch.int8] == [
        (24, 10),
        (6, 24),
    ]
    assert not {"up.weight", "down.weight"} & converted.state_dict().keys()


def test_the_nodes_that_they_write_are_like_those_of_the_engine(program, quantizer):
    converted = ours(program, quantizer)
    written = [node for node in converted.graph.nodes if "affine" in str(node.target)]
    assert all(isinstance(node.target, OpOverload) and node.meta["from_node"] for node in written)
    for node in foreign_ops(converted, "dequantize_affine"):
        assert node.meta["val"].dtype is torch.float32
        assert "nn_module_stack" in node.meta or node.args[0].op == "call_function"  # the model's input has none


def test_the_result_is_exported_again(program, quantizer):
    converted = ours(program, quantizer)
    again = torch.export.export(converted, (X,)).module()
    torch.testing.assert_close(again(X), converted(X))


def test_the_report_says_what_they_are(program, quantizer):
    report = explain(ours(program, quantizer))
    assert {decision.op for decision in report.quantized} == {"aten.linear.default"}
    assert all("AffineQuantized" in group.spec for group in report.groups)


def test_without_data_they_are_named():
    quantizer = Linears(*QUANTIZERS["tokens at run time"])
    prepared = prepare_pt2e(torch.export.export(nn.Sequential(nn.Linear(10, 3)).eval(), (X,)), quantizer)
    with pytest.raises(CalibrationError, match=r"(?s)1 observers never saw data.*input input"):
        convert_pt2e(prepared)


def test_two_kinds_of_blocks_on_one_tensor_are_quantized_apart():
    """Their classes and arguments, not the fields of the spec, say what integers they make."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(10, 4), nn.Linear(10, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(x) + self.second(x)

    class Differently(Linears):
        def annotate(self, model: GraphModule) -> GraphModule:
            for node in model.graph.find_nodes(op="call_function", target=aten.linear.default):
                spec = self.weight if node.name == "linear" else self.activation
                node.meta["quantization_annotation"] = QuantizationAnnotation({node.args[0]: spec})
            return model

    tensor, row = spec("AffineQuantizedMinMaxObserver", PerTensor()), spec("AffineQuantizedMinMaxObserver", PerAxis(0))
    converted = ours(torch.export.export(Twice().eval(), (X,)), Differently(tensor, row))
    assert {node.args[1] for node in foreign_ops(converted, "quantize_affine")} == {(4, 10), (1, 10)}
