"""What a converted eager model can become: files, copies, an exported graph, programs of the three lowerings."""

from __future__ import annotations

import copy
import io
import pickle
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pt2e_quant.eager import DeQuantStub, QuantStub, convert, fuse_modules, prepare
from pt2e_quant.lowering.executorch import lower_to_executorch
from pt2e_quant.lowering.inductor import lower_to_inductor
from pt2e_quant.lowering.onnx import lower_to_onnx
from pt2e_quant.nn.quantized import FloatFunctional
from pt2e_quant.passes.numbers_as_qparams import numbers_as_qparams
from pt2e_quant.qconfig import default_per_channel_symmetric_qnnpack_qconfig, get_default_qconfig


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.conv1, self.bn, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.sum, self.act = nn.Conv2d(8, 8, 3, padding=1), FloatFunctional(), nn.Hardswish()
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.relu(self.bn(self.conv1(self.quant(x))))
        x = self.act(self.sum.add_relu(self.conv2(x), x))
        return self.dequant(self.fc(self.pool(x).mean((2, 3))))


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
QCONFIGS = {"x86": get_default_qconfig("x86"), "qnnpack": default_per_channel_symmetric_qnnpack_qconfig}


@cache
def converted(backend: str = "x86") -> Any:
    model = fuse_modules(Net().eval(), [["conv1", "bn", "relu"]])
    model.qconfig = QCONFIGS[backend]  # type: ignore[assignment]
    prepared = prepare(model)
    prepared(X)
    return convert(prepared)


def exported(backend: str = "x86") -> torch.export.ExportedProgram:
    return torch.export.export(converted(backend), (X,))


def test_a_state_dict_loads_from_a_file_without_code() -> None:
    file = io.BytesIO()
    torch.save(converted().state_dict(), file)
    file.seek(0)
    model = fuse_modules(Net().eval(), [["conv1", "bn", "relu"]])
    model.qconfig = QCONFIGS["x86"]  # type: ignore[assignment]
    other = prepare(model)
    other(2 * X)
    made = convert(other)
    made.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(made(X), converted()(X))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), nn.DataParallel])
def test_copies_compute_the_same(copied: Any) -> None:
    assert torch.equal(copied(converted())(X), converted()(X))


def test_an_exported_graph_computes_the_same_with_nothing_but_static_grids() -> None:
    gm = numbers_as_qparams(exported().module())
    # sums in float, of which ties are rounded another way: one step in the middle, less than one at the end
    assert (gm(X) - converted()(X)).abs().max() <= converted().fc.scale
    ops = {str(node.target) for node in gm.graph.nodes if node.op == "call_function"}
    kinds = {op.split(".")[-1] for op in ops if "quantize_per_tensor" in op}
    assert kinds == {"default"}
    assert not any("round" in op or "clamp" in op for op in ops)


def test_scales_that_a_graph_writes_stay_tensors() -> None:
    class Moving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.zero = nn.Buffer(torch.ones(1)), nn.Buffer(torch.zeros(1, dtype=torch.long))

        def forward(self, x: Tensor) -> Tensor:
            self.scale.mul_(2)
            op: Any = torch.ops.quantized_decomposed.quantize_per_tensor.tensor
            return op(x, self.scale, self.zero, 0, 255, torch.uint8)  # type: ignore[no-any-return]

    gm = torch.export.export(Moving(), (X,)).module()
    before = str(gm.graph)
    assert str(numbers_as_qparams(gm).graph) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lower", "backend"), [(lower_to_executorch, "qnnpack"), (lower_to_inductor, "x86"), (lower_to_onnx, "x86")]
)
def test_each_lowering_computes_the_same(lower: Any, backend: str) -> None:
    made = lower(exported(backend)).run(X)
    made = made[0] if isinstance(made, tuple) else made
    # one step in the middle; Inductor leaves out the last rounding, half a step
    assert (made - converted(backend)(X)).abs().max() <= 1.5 * converted(backend).fc.scale
