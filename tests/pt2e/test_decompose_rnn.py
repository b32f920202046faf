"""decompose={"rnn"}: LSTM, GRU and RNN layers unrolled, so that their linears are quantized, on both backends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from pt2e_quant import convert_pt2e, explain, prepare_pt2e, prepare_qat_pt2e
from pt2e_quant.lowering.executorch import lower_to_executorch
from pt2e_quant.lowering.inductor import lower_to_inductor
from pt2e_quant.ops import RNN_CELL
from pt2e_quant.passes.decompose_rnn import decompose_rnn
from pt2e_quant.pt2e.capture import capture
from pt2e_quant.reasons import refusals
from quantizers.x86_inductor import X86InductorQuantizer, get_default_x86_inductor_quantization_config
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.nets import export, sqnr
from tests.pt2e.kit import DYNAMIC as TOY
from tests.pt2e.kit import Toy, the_call
from tests.qat.kit import TRAINED

# nn.RNNBase sets attributes while it is exported, and projections have no oneDNN kernel, both of which torch warns of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The tensor attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
]

LINEAR = torch.ops.aten.linear.default
DYNAMIC = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
STATIC = get_symmetric_quantization_config(is_per_channel=True)
X86 = get_default_x86_inductor_quantization_config

QUANTIZERS = {
    "XNNPACK dynamic": lambda: XNNPACKQuantizer().set_operator_type(LINEAR, DYNAMIC),
    "XNNPACK static": lambda: XNNPACKQuantizer().set_operator_type(LINEAR, STATIC),
    "x86 dynamic": lambda: X86InductorQuantizer().set_operator_type(LINEAR, X86(is_dynamic=True)),
    "x86 static": lambda: X86InductorQuantizer().set_operator_type(LINEAR, X86()),
}
CASES = {
    "LSTM, two layers": (nn.LSTM, {"num_layers": 2}),
    "LSTM, both ways, no bias": (nn.LSTM, {"bidirectional": True, "bias": False, "batch_first": True}),
    "LSTM, two layers both ways, projected": (nn.LSTM, {"bidirectional": True, "num_layers": 2, "proj_size": 5}),
    "GRU, both ways": (nn.GRU, {"bidirectional": True}),
    "GRU, two layers, no bias": (nn.GRU, {"num_layers": 2, "bias": False, "batch_first": True}),
    "RNN": (nn.RNN, {"nonlinearity": "tanh"}),
    "RNN, relu": (nn.RNN, {"nonlinearity": "relu", "batch_first": True}),
}

QUICK = {("LSTM, both ways, no bias", "XNNPACK static")}
STEPS = 3


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **kwargs: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = kind(10, 12, **kwargs)

    def forward(self, x: Tensor, state=None):
        return self.rnn(x, state)


def recurrent(case: str) -> Recurrent:
    kind, options = CASES[case]
    return Recurrent(kind, **options).eval()


def inputs(model: Recurrent, batch: int = 3, seed: int = 0):
    """A sequence of three steps, and a state that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((batch, STEPS, 10) if model.rnn.batch_first else (STEPS, batch, 10), generator=generator)
    count = model.rnn.num_layers * (2 if model.rnn.bidirectional else 1)
    state = torch.randn(count, batch, model.rnn.proj_size or 12, generator=generator)
    cell = torch.randn(count, batch, 12, generator=generator)
    return x, (state, cell) if isinstance(model.rnn, nn.LSTM) else state


def quantized(model: Recurrent, quantizer, example=None):
    example = inputs(model) if example is None else example
    prepared = prepare_pt2e(torch.export.export(model, example), quantizer, decompose={"rnn"}, require=["linear"])
    with torch.no_grad():
        for seed in range(4):
            prepared(*inputs(model, seed=seed))
    return convert_pt2e(prepared)


@pytest.mark.parametrize("case", CASES)
def test_unrolling_keeps_the_outputs_and_states_of_the_layer(case):
    """Up to rounding: the operator sums in another order."""
    model = recurrent(case)
    gm = capture(torch.export.export(model, inputs(model)), [decompose_rnn]).gm
    assert not [node for node in gm.graph.nodes if "lstm" in str(node.target) or "gru" in str(node.target)]
    result, expected = gm(*inputs(model, seed=1)), model(*inputs(model, seed=1))
    assert pytree.tree_structure(result) == pytree.tree_structure(expected)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def test_the_last_state_of_one_layer_is_no_concatenation_of_one_tensor():
    """Which XNNPACK takes apart from its other operators."""
    model = recurrent("RNN")
    gm = decompose_rnn(export(model, *inputs(model)).module())
    assert [len(node.args[0]) for node in gm.graph.nodes if node.target is torch.ops.aten.stack.default] == [STEPS]


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("case", CASES)
def test_all_weights_are_integers_stored_once_and_the_numbers_stay_close(case, name):
    """Users ask for 30 dB."""
    model = recurrent(case)
    converted = quantized(model, QUANTIZERS[name]())
    weights = [value.dtype for value in converted.state_dict().values() if value.dim() == 2]
    assert weights == [torch.int8] * len([p for p in model.parameters() if p.dim() == 2])
    with torch.no_grad():
        result, expected = converted(*inputs(model)), model(*inputs(model))
    for one, other in zip(pytree.tree_leaves(result), pytree.tree_leaves(expected), strict=True):
        assert sqnr(other, one) > 30


BACKENDS = [
    pytest.param(case, name, marks=() if (case, name) in QUICK else pytest.mark.slow)
    for case in ("LSTM, both ways, no bias", "GRU, both ways")
    for name in QUANTIZERS
]


@pytest.mark.parametrize(("case", "name"), BACKENDS)
def test_the_backend_runs_its_linears_in_integers_and_returns_outputs_and_states(case, name):
    """A value on the edge of two codes may fall to the other side after a float sum in another order: 40 dB are left.

    A step has a linear of its own in each direction, and there is one for all inputs: 2 * (3 + 1).
    """
    pytest.importorskip("executorch")
    model = recurrent(case)
    converted = quantized(model, QUANTIZERS[name]())
    with torch.no_grad():
        expected = pytree.tree_leaves(converted(*inputs(model)))
        if name.startswith("x86"):
            program = lower_to_inductor(converted)
            result = pytree.tree_leaves(program(*inputs(model)))
        else:
            program = lower_to_executorch(converted)
            assert program.delegates == 1
            result = program.run(*inputs(model))
    integer = {kernel.node for kernel in program.kernels if getattr(kernel, "precision", "") != "float"}
    assert len(integer & {node.name for node in converted.graph.nodes if node.target is LINEAR}) == 2 * (STEPS + 1)
    for one, other in zip(result, expected, strict=True):
        assert sqnr(other, one) > 40


@pytest.mark.slow
def test_the_batch_may_be_dynamic():
    pytest.importorskip("executorch")
    model = recurrent("LSTM, both ways, no bias")
    batch = Dim("batch", min=1, max=8)
    shapes = {"x": {0: batch}, "state": ({1: batch}, {1: batch})}
    exported = torch.export.export(model, inputs(model), dynamic_shapes=shapes)
    converted = convert_pt2e(prepare_pt2e(exported, QUANTIZERS["XNNPACK dynamic"]()))
    program = lower_to_executorch(converted)
    others = inputs(model, batch=7)
    with torch.no_grad():
        expected = pytree.tree_leaves(converted(*others))
    for one, other in zip(program.run(*others), expected, strict=True):
        assert sqnr(other, one) > 40


def test_xnnpack_unrolls_by_default_and_nothing_is_lost_for_who_asks_for_nothing():
    model = recurrent("RNN")
    exported = torch.export.export(model, inputs(model))
    quantizer = XNNPACKQuantizer().set_global(DYNAMIC)
    assert len(explain(prepare_pt2e(exported, quantizer)).quantized) == STEPS + 1
    whole = prepare_pt2e(exported, quantizer, decompose=(), allow_empty=True)
    assert [node for node in whole.graph.nodes if str(node.target) == "aten.rnn_tanh.input"]
    torch.testing.assert_close(whole(*inputs(model)), model(*inputs(model)))


class WithHead(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(10, 12, num_layers=2, dropout=dropout), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def reason_of_the_rnn(model: nn.Module, **kwargs) -> str:
    exported = torch.export.export(model, (torch.randn(4, 2, 10),))
    report = explain(prepare_pt2e(exported, Toy(TOY), **kwargs))
    (rnn,) = (decision for decision in report.skipped if "gru" in decision.op)
    assert rnn.code == "composite_op"
    assert not [decision for decision in report.skipped if decision.node.startswith("getitem")]
    return rnn.reason


def test_an_rnn_that_stays_whole_is_reported_with_the_way_out():
    assert 'decompose={"rnn"}' in reason_of_the_rnn(WithHead().eval())


@pytest.mark.filterwarnings("ignore:the model was exported in training mode")
def test_dropout_in_training_is_not_unrolled():
    assert "model.eval()" in reason_of_the_rnn(WithHead(dropout=0.5).train(), decompose={"rnn"})


def test_packed_sequences_are_not_unrolled():
    """torch.export refuses them; a graph that was made otherwise may have them."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    rnn = graph.call_function(torch.ops.aten.gru.data, (x, x, x, [x, x], False, 1, 0.0, False, False))
    graph.output(rnn)
    decompose_rnn(torch.fx.GraphModule(nn.Module(), graph))
    assert "pack_padded_sequence" in refusals(rnn)[0].reason


class Cells(nn.Module):
    """Two steps of a cell of each kind, on the same input."""

    def __init__(self, bias: bool = True, other: str = "relu") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.gru = nn.LSTMCell(6, 8, bias), nn.GRUCell(6, 8, bias)
        self.tanh, self.other = nn.RNNCell(6, 8, bias), nn.RNNCell(6, 8, bias, nonlinearity=other)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        state, gated, plain, rectified = None, None, None, None
        for _ in range(2):
            state = self.lstm(x, state)
            gated, plain, rectified = self.gru(x, gated), self.tanh(x, plain), self.other(x, rectified)
        return (*state, gated, plain, rectified)


@pytest.mark.parametrize("bias", [True, False])
def test_cells_are_written_out_and_keep_their_states(bias):
    """Up to rounding: the operator sums in another order."""
    model, x = Cells(bias).eval(), torch.randn(3, 6)
    gm = capture(torch.export.export(model, (x,)), [decompose_rnn]).gm
    assert not [node for node in gm.graph.nodes if node.target in RNN_CELL]
    torch.testing.assert_close(gm(x), model(x), rtol=1e-5, atol=1e-6)


def test_xnnpack_runs_the_linears_of_cells_in_integers():
    """Two in each cell and step; verify compares the program with the graph."""
    pytest.importorskip("executorch")
    model, x = Cells(other="tanh").eval(), torch.randn(3, 6)
    prepared = prepare_pt2e(torch.export.export(model, (x,)), XNNPACKQuantizer().set_global(STATIC))
    prepared(x)
    program = lower_to_executorch(convert_pt2e(prepared))
    assert [kernel.precision for kernel in program.kernels if "linear" in kernel.op] == ["int8"] * 16
    assert program.delegates == 1


def test_a_cell_that_stays_whole_is_reported_with_the_way_out():
    report = explain(
        prepare_pt2e(torch.export.export(nn.GRUCell(3, 4), (torch.randn(2, 3),)), Toy(TOY), allow_empty=True)
    )
    (cell,) = (decision for decision in report.skipped if "gru_cell" in decision.op)
    assert (cell.code, 'decompose={"rnn"}' in cell.reason) == ("composite_op", True)


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
def test_dropout_between_unrolled_layers_follows_the_mode(train: bool):
    program = export(WithHead(dropout=0.3), torch.randn(5, 2, 10), train=train)
    gm = prepare_qat_pt2e(program, Toy(TRAINED), decompose={"rnn"})
    for mode in (True, False):
        assert the_call(gm.train(mode), torch.ops.aten.dropout.default).args[1:] == (0.3, mode)
