"""Integer inputs and outputs: same values, another signature, also in the .pte (users' pain 28)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pt2e_quant import QuantizedIO, convert_pt2e, explain, prepare_pt2e
from pt2e_quant.errors import ConversionError
from pt2e_quant.lowering.executorch import lower_to_executorch
from pt2e_quant.report import Report
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.nets import ConvNet, export


class TwoInTwoOut(nn.Module):
    """x is read twice; y by a float op; the second output is computed in float."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(6, 5, bias=False)
        self.right = nn.Linear(6, 5)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(x) + self.right(x), torch.sigmoid(y)


@pytest.fixture
def prepared():
    prepared = prepare_pt2e(
        export(ConvNet(), torch.randn(2, 3, 16, 16)), XNNPACKQuantizer(get_symmetric_quantization_config())
    )
    prepared(torch.randn(2, 3, 16, 16))
    return prepared


@pytest.fixture
def two():
    quantizer = XNNPACKQuantizer(get_symmetric_quantization_config())
    prepared = prepare_pt2e(export(TwoInTwoOut(), torch.randn(2, 6), torch.randn(3)), quantizer)
    prepared(torch.randn(2, 6), torch.randn(3))
    return prepared


def test_the_integer_path_equals_the_float_path_bit_for_bit(prepared):
    """Users' item 28: the integer path equals the float path after manual q/dq, bit for bit."""
    x = torch.randn(2, 3, 16, 16)
    integer = convert_pt2e(prepared, quantized_io=QuantizedIO(inputs=[0], outputs=[0]))
    border = explain(integer)
    q = integer(border.inputs[0].quantize(x))
    assert q.dtype is torch.int8
    assert torch.equal(border.outputs[0].dequantize(q), convert_pt2e(prepared)(x))


def test_the_signature_and_the_recorded_values_have_the_integer_dtype(prepared):
    """Users' item 28: quantized_io changes the dtypes of the signature."""
    integer = convert_pt2e(prepared, quantized_io=QuantizedIO(inputs=[0]))
    (placeholder,) = integer.graph.find_nodes(op="placeholder")
    assert placeholder.meta["val"].dtype is torch.int8
    assert placeholder.meta["tensor_meta"].dtype is torch.int8


def test_an_input_that_several_ops_read_with_one_grid_becomes_integers(two):
    x, y = torch.randn(2, 6), torch.randn(3)
    integer = convert_pt2e(two, quantized_io=QuantizedIO(inputs=[0], outputs=[0]))
    border = explain(integer)
    q, unchanged = integer(border.inputs[0].quantize(x), y)
    expected = convert_pt2e(two)(x, y)
    assert torch.equal(border.outputs[0].dequantize(q), expected[0])
    assert torch.equal(unchanged, expected[1])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (QuantizedIO(inputs=[1]), "input y cannot become integers"),
        (QuantizedIO(outputs=[1]), "output sigmoid cannot become integers: it is computed in float"),
        (QuantizedIO(inputs=[2]), "names input 2; the model has inputs 0 to 1"),
        (QuantizedIO(outputs=[-1]), "names output -1"),
    ],
)
def test_what_cannot_become_integers_is_an_error_that_names_it(two, wanted, message):
    with pytest.raises(ConversionError, match=message):
        convert_pt2e(two, quantized_io=wanted)


def test_the_report_keeps_scale_and_zero_point_through_json(prepared):
    report = explain(convert_pt2e(prepared, quantized_io=QuantizedIO(inputs=[0], outputs=[0])))
    again = Report.from_json(report.to_json())
    assert again.inputs == report.inputs
    assert again.outputs == report.outputs
    assert "Integer inputs\n  0: torch.int8, scale" in report.text()


def test_the_pte_takes_and_returns_integers_and_tells_their_qparams(prepared):
    """Users' item 28: scale and zero point stand in the file as well."""
    x = torch.randn(2, 3, 16, 16)
    integer = convert_pt2e(prepared, quantized_io=QuantizedIO(inputs=[0], outputs=[0]))
    border = explain(integer)
    program = lower_to_executorch(integer)
    (q,) = program.run(border.inputs[0].quantize(x))
    assert q.dtype is torch.int8
    # Two integer kernels that round alike may differ by one step where a value lies in the middle between two.
    assert (q.int() - integer(border.inputs[0].quantize(x)).int()).abs().max() <= 1
    assert program.constant("input_0_scale") == pytest.approx(border.inputs[0].scale, rel=0, abs=0)
    assert program.constant("input_0_zero_point") == border.inputs[0].zero_point
    assert program.constant("output_0_scale") == border.outputs[0].scale
