"""lower_to_onnx: integer kernels in onnxruntime, files that other runtimes read, errors instead of float kernels."""

from __future__ import annotations

import json
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.errors import LoweringError
from pt2e_quant.grid import Grid
from pt2e_quant.lowering.onnx import OnnxProgram, lower_to_onnx
from quantizers.onnx_runtime import (
    OnnxRuntimeQuantizer,
    get_onnx_runtime_quantization_config,
    get_onnx_runtime_weight_only_config,
)
from quantizers.x86_inductor import X86InductorQuantizer, get_default_x86_inductor_quantization_config
from quantizers.xnnpack import XNNPACKQuantizer, get_8da4w_config, get_symmetric_quantization_config
from tests.nets import ConvNet, export

STATIC = get_onnx_runtime_quantization_config()


class Rows(nn.Module):
    """Linears on three dimensions; 64 inputs are two blocks of 32, and 48 are none."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.odd = nn.Linear(64, 96), nn.Linear(96, 48, bias=False), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.odd(self.down(torch.relu(self.up(x))))


def converted(model: nn.Module, x: Tensor, quantizer, **kwargs):
    prepared = prepare_pt2e(export(model, x, **kwargs), quantizer)
    for _ in range(2):
        prepared(torch.randn_like(x))
    return convert_pt2e(prepared)


def quantizer(config=STATIC) -> OnnxRuntimeQuantizer:
    return OnnxRuntimeQuantizer().set_global(config)


def kernels(program: OnnxProgram) -> list[tuple[str, str]]:
    return [(kernel.kernel, kernel.precision) for kernel in program.kernels]


@pytest.fixture(scope="module")
def graph():
    torch.manual_seed(0)
    shapes = ({0: Dim("batch", max=8)},)
    return converted(ConvNet(), torch.randn(2, 3, 16, 16), quantizer(), dynamic_shapes=shapes)


@pytest.fixture(scope="module")
def cnn(graph):
    return lower_to_onnx(graph)


@pytest.fixture(scope="module")
def path(cnn, tmp_path_factory):
    return cnn.save(tmp_path_factory.mktemp("onnx") / "cnn.onnx")


def steps(graph, found: Tensor, expected: Tensor) -> float:
    """The largest difference, in steps of the output's grid."""
    grid = Grid.of_value(graph.graph.output_node().args[0][0])
    return float((found - expected).abs().max() / grid.scale)


def test_every_quantized_operator_of_a_cnn_is_an_integer_kernel(cnn):
    assert kernels(cnn) == [
        ("QLinearConv", "int8"),
        ("QLinearConv", "int8"),
        ("NhwcMaxPool", "int8"),
        ("QLinearGlobalAveragePool", "int8"),
        ("QGemm", "int8"),
    ]
    assert cnn.fallbacks == ()


def test_lowering_ran_the_file_beside_the_graph(cnn):
    assert cnn.verified


@pytest.mark.parametrize("batch", [1, 7])
def test_a_dynamic_batch_stays_dynamic_within_one_step(graph, cnn, batch):
    x = torch.randn(batch, 3, 16, 16)
    assert steps(graph, cnn(x), graph(x)) <= 1.01  # a scale is rounded to float32


def test_the_file_passes_the_checker_and_has_opset_21(path):
    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    assert [(one.domain, one.version) for one in model.opset_import] == [("", 21)]


def test_its_operators_are_pairs_of_quantize_and_dequantize_around_float_ones(path):
    found = {node.op_type for node in onnx.load(str(path)).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear", "Conv", "Gemm", "MaxPool"} <= found
    assert not any(name.startswith("QLinear") for name in found)


def test_nodes_are_named_after_the_nodes_of_the_graph(graph, path):
    known = {node.name for node in graph.graph.nodes}
    convs = [node.name for node in onnx.load(str(path)).graph.node if node.op_type == "Conv"]
    assert convs == ["conv2d/Conv", "conv2d_1/Conv"]
    assert {name.partition("/")[0] for name in convs} <= known


def test_the_file_tells_nothing_of_the_machine(cnn):
    assert b".py" not in cnn.model
    assert b"/home" not in cnn.model


def test_a_session_of_anybody_computes_the_same(graph, path):
    x = torch.randn(2, 3, 16, 16)
    (found,) = onnxruntime.InferenceSession(str(path)).run(None, {"x": x.numpy()})
    assert steps(graph, torch.from_numpy(found), graph(x)) <= 1.01


def test_openvino_reads_the_same_file(graph, path):
    openvino = pytest.importorskip("openvino")
    x = torch.randn(2, 3, 16, 16)
    model = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = torch.from_numpy(np.array(model([x.numpy()])[0]))
    # OpenVINO rounds between its kernels by rules of its own: measured, two steps at most.
    assert steps(graph, found, graph(x)) <= 2.01


def test_the_account_is_plain_data_and_text(cnn):
    data = json.loads(cnn.to_json())
    assert (data["opset"], data["bytes"], data["fallbacks"]) == (21, len(cnn.model), [])
    assert "conv2d_1 (aten.conv2d.default): QLinearConv, int8" in cnn.text()
    assert cnn.fate("linear") == "int8, QGemm"


def test_inputs_of_another_size_are_refused_with_the_way_out(cnn):
    with pytest.raises(LoweringError, match=r"failed on inputs float32\[2, 3, 16, 16, 1\].*\n.*dynamic_shapes"):
        cnn(torch.randn(2, 3, 16, 16, 1))


@pytest.mark.parametrize(
    "quantizer",
    [
        pytest.param(quantizer(), id="u8", marks=pytest.mark.slow),
        pytest.param(XNNPACKQuantizer().set_global(get_symmetric_quantization_config(True)), id="s8"),
    ],
)
def test_linears_on_more_dimensions_are_integer_kernels(quantizer):
    """Signed inputs too: of the MatMul and Add that torch writes, onnxruntime loads none."""
    program = lower_to_onnx(converted(Rows(), torch.randn(2, 5, 64), quantizer))
    assert kernels(program) == [("QGemm", "int8")] * 3


def test_a_linear_that_ends_in_float_adds_its_bias_as_an_integer():
    config = get_default_x86_inductor_quantization_config()
    program = lower_to_onnx(converted(Rows(), torch.randn(4, 64), X86InductorQuantizer().set_global(config)))
    assert kernels(program) == [("QGemm", "int8")] * 3


def test_qparams_at_run_time_make_one_kernel_with_the_product():
    config = get_onnx_runtime_quantization_config(is_dynamic=True)
    program = lower_to_onnx(converted(Rows(), torch.randn(2, 5, 64), quantizer(config)))
    assert kernels(program) == [("DynamicQuantizeMatMul", "dynamic")] * 3
    assert program.verified.sqnr > 60


@pytest.fixture(scope="module")
def four_bits():
    torch.manual_seed(0)
    return lower_to_onnx(
        converted(Rows(), torch.randn(2, 5, 64), quantizer(get_onnx_runtime_weight_only_config(4, 32)))
    )


def test_weights_of_4_bits_in_blocks_have_a_kernel(four_bits):
    assert kernels(four_bits) == [("MatMulNBits", "weight only")] * 2  # 48 inputs do not split into blocks of 32
    assert four_bits.verified.sqnr > 100  # equal but for the order of sums in float32


def test_two_weights_of_4_bits_stand_in_a_byte(four_bits):
    held = {one.name: one for one in onnx.load_from_string(four_bits.model).graph.initializer}
    packed = [one for one in held.values() if one.data_type == onnx.TensorProto.INT4]
    assert sorted(len(one.raw_data) for one in packed) == [96 * 48 // 2, 64 * 96 // 2]


def test_a_remark_says_that_other_sessions_round_the_inputs(four_bits):
    assert [remark.node for remark in four_bits.remarks] == ["linear"]
    assert "session.qdq_matmulnbits_accuracy_level" in four_bits.text()


@pytest.mark.slow
def test_inputs_rounded_for_each_row_multiply_weights_of_4_bits():
    recipe = XNNPACKQuantizer().set_global(get_8da4w_config(32))
    program = lower_to_onnx(converted(Rows(), torch.randn(2, 5, 64), recipe))
    assert kernels(program) == [("MatMulNBits", "weight only")] * 2


class Padded(nn.Module):
    """As TensorFlow pads: more at the end than at the beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, (3, 5), stride=2, padding=(1, 0), groups=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(nn.functional.pad(torch.relu(self.first(x)), (0, 2, 1, 3)))


def test_uneven_padding_is_part_of_the_integer_convolution():
    shapes = ({0: Dim("batch", max=8)},)
    graph = converted(Padded(), torch.randn(2, 3, 12, 16), quantizer(), dynamic_shapes=shapes)
    program = lower_to_onnx(graph)
    assert kernels(program) == [("QLinearConv", "int8")] * 2
    assert "Pad" not in {node.op_type for node in onnx.load_from_string(program.model).graph.node}
    x = torch.randn(5, 3, 12, 16)
    assert steps(graph, program(x), graph(x)) <= 1.01


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(50, 64), nn.Linear(64, 10)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


def test_of_a_table_the_rows_that_are_looked_up_become_real():
    exported = torch.export.export(Words().eval(), (torch.randint(0, 50, (2, 5)),))
    program = lower_to_onnx(convert_pt2e(prepare_pt2e(exported, quantizer(get_onnx_runtime_weight_only_config(8)))))
    assert kernels(program) == [("Gather", "weight only"), ("MatMulNBits", "weight only")]
    assert len(program.model) < 50 * 64 * 2 + 5000  # a byte for each value, not four


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_what_onnxruntime_has_no_kernel_for_is_named_with_the_reason(dynamic):
    """Half precision; and a convolution with qparams at run time."""
    dtype = torch.float32 if dynamic else torch.float16
    config = get_symmetric_quantization_config(True, is_dynamic=dynamic)
    x = torch.randn(1, 3, 8, 8, dtype=dtype)
    graph = converted(nn.Sequential(nn.Conv2d(3, 8, 3)).to(dtype), x, XNNPACKQuantizer().set_global(config))
    program = lower_to_onnx(graph, allow_float=True)
    reason = "computed at run time" if dynamic else "computes in float16"
    assert reason in program.fallbacks[0].reason
    assert program.verified


class Swish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.hardswish(self.conv(x))


@pytest.fixture(scope="module")
def swish():
    config = get_default_x86_inductor_quantization_config()
    return converted(Swish(), torch.randn(1, 3, 8, 8), X86InductorQuantizer().set_global(config))


def test_a_quantized_convolution_that_would_run_in_float_is_an_error(swish):
    with pytest.raises(LoweringError, match=r"conv2d .*, in 'conv', .*: its output is not quantized.*\n.*allow_float"):
        lower_to_onnx(swish)


@pytest.mark.slow
def test_allow_float_lists_it_instead(swish):
    program = lower_to_onnx(swish, allow_float=True)
    assert [fallback.node for fallback in program.fallbacks] == ["conv2d"]
    assert program.count("float") == 1
    assert program.verified


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


def test_state_is_refused_with_the_way_out():
    with pytest.raises(LoweringError, match=r"'calls'.*Take the buffer as an input"):
        lower_to_onnx(torch.export.export(Counter(), (torch.randn(2),)))


def test_bfloat16_is_refused_by_name():
    model = nn.Linear(4, 4).bfloat16()
    with pytest.raises(LoweringError, match="its input is bfloat16"):
        lower_to_onnx(torch.export.export(model, (torch.randn(2, 4).bfloat16(),)))


@pytest.mark.parametrize("opset", [20, True, "21"])
def test_an_opset_without_integers_of_4_bits_is_refused(graph, opset):
    with pytest.raises(LoweringError, match=r"opset must be (a number from 21 on|an int)"):
        lower_to_onnx(graph, opset=opset)


def test_without_the_extra_the_error_says_what_to_install(graph, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(LoweringError, match=r'pip install "pt2e_quant\[onnx\]"'):
        lower_to_onnx(graph)


@pytest.mark.slow
def test_a_float_model_is_written_too_and_a_remark_says_so():
    program = lower_to_onnx(torch.export.export(nn.Linear(4, 3), (torch.randn(2, 4),)))
    assert program.kernels == ()
    assert "nothing in this graph is quantized" in program.text()
