"""Verified lowering: what counts as rounding, what does not, and where a program comes apart first."""

import copy
import importlib
import math

import pytest
import torch
from torch import nn

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.errors import CalibrationError, LoweringError
from pt2e_quant.graph.run import Arguments
from pt2e_quant.lowering.common.verify import cut_after, first_apart, unverified, verified
from pt2e_quant.ops import is_dequantize
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config


class Block(nn.Module):
    """Two convolutions, a residual, a linear: eight tensors on grids."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6, eps=1e-3)
        self.second = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.first(x)).relu()
        y = y + self.second(y)
        return self.head(y.mean((2, 3)))


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 3, 9, 9, generator=generator) for _ in range(3)]


@pytest.fixture(scope="module")
def converted(batches):
    torch.manual_seed(3)
    exported = torch.export.export(Block().eval(), (batches[0],))
    prepared = prepare_pt2e(
        exported, XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    )
    for batch in batches:
        prepared(batch)
    return convert_pt2e(prepared)


def runs(graph, change=lambda value: value):
    """A program that computes what the graph does, and then something more."""

    def run(*args, **kwargs):
        with torch.no_grad():
            return [change(value) for value in torch.utils._pytree.tree_leaves(graph(*args, **kwargs))]

    return run


def scale_of(converted):
    return next(node.args[1] for node in reversed(converted.graph.nodes) if is_dequantize(node))


def test_a_program_that_computes_the_same_is_verified_as_equal(converted, batches):
    result = verified(converted, runs(converted), batches)
    assert result
    assert (result.batches, result.sqnr, result.outputs[0].steps) == (3, math.inf, 0.0)
    assert str(result).startswith("verified on 3 batches: output 0 (")


def test_one_step_of_the_output_s_grid_is_rounding(converted, batches):
    step = scale_of(converted)
    result = verified(converted, runs(converted, lambda value: value + step), batches)
    assert result.outputs[0].steps == pytest.approx(1, rel=1e-5)  # float32
    assert result.outputs[0].allowed is None


def test_what_is_more_than_rounding_raises_with_the_figures_and_the_way_out(converted, batches):
    with pytest.raises(
        LoweringError, match=r"(?s)more than rounding explains.*output 0 .* dB are expected.*verify=False"
    ):
        verified(converted, runs(converted, lambda value: value * 1.5), batches)


def test_another_number_of_outputs_and_another_shape_raise(converted, batches):
    with pytest.raises(LoweringError, match="returns 0 outputs, the converted graph 1"):
        verified(converted, lambda *args: [], batches)
    with pytest.raises(
        LoweringError, match=r"output 0 .* is float32 \[2, 4\], of the converted graph float32 \[2, 5\]|\[2, 4\]"
    ):
        verified(converted, runs(converted, lambda value: value[:, :4]), batches)


def test_values_that_are_no_numbers_in_the_program_alone_raise(converted, batches):
    with pytest.raises(LoweringError, match="-inf dB"):
        verified(
            converted, runs(converted, lambda value: value.clone().index_fill_(1, torch.tensor([0]), math.nan)), batches
        )


def test_a_batch_for_another_model_is_named(converted):
    result = verified(converted, runs(converted), [torch.randn(2, 4, 9, 9)])
    assert not result
    assert "the converted graph itself does not run on these inputs" in str(result)


def test_a_part_of_a_graph_computes_what_the_whole_one_computes_there(converted, batches):
    cuts = [node for node in converted.graph.nodes if is_dequantize(node) and node.args[0].op == "call_function"]
    part = cut_after(converted, cuts[-1])
    assert torch.equal(part(batches[0])[0], converted(batches[0]))


@pytest.mark.parametrize("position", [1, 3, -1])
def test_the_first_operator_that_differs_is_found(converted, batches, position):
    """The lowering of a planted fault: it is one in every part of the graph that computes this tensor."""
    cuts = [node for node in converted.graph.nodes if is_dequantize(node) and node.args[0].op == "call_function"]
    wrong = cuts[position]

    def lower(part, batch):
        part = copy.deepcopy(part)
        for node in part.graph.nodes:
            if node.name == wrong.name:
                node.update_arg(1, node.args[1] * 2)
        part.recompile()
        return runs(part)

    found = first_apart(converted, lower, Arguments((batches[0],), {}))
    assert found is wrong.args[0].args[0]


def test_a_graph_that_draws_random_numbers_cannot_be_compared():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    graph = torch.export.export(Noisy(), (torch.zeros(2),)).module()
    assert "random" in str(verified(graph, runs(graph), [torch.zeros(2)]))


def test_what_was_not_run_says_why_and_is_false():
    result = unverified("there is no runtime here")
    assert not result
    assert str(result) == "not verified: there is no runtime here"
    assert result.to_dict() == {"outputs": (), "batches": 0, "reason": "there is no runtime here"}


@pytest.mark.parametrize("verify", [True, False])
def test_a_program_says_whether_it_was_run(converted, verify):
    pytest.importorskip("executorch")
    from pt2e_quant.lowering.executorch import lower_to_executorch

    program = lower_to_executorch(converted, verify=verify)
    assert bool(program.verified) is verify
    assert ("verified on 1 batch" if verify else "not verified: verify=False") in program.text()


def test_no_batch_to_verify_with_is_an_error():
    """Not taken for the example inputs."""
    pytest.importorskip("executorch")
    from pt2e_quant.lowering.executorch import lower_to_executorch

    graph = torch.export.export(nn.Linear(3, 2).eval(), (torch.zeros(1, 3),))
    with pytest.raises(CalibrationError, match="verify"):
        lower_to_executorch(graph, verify=[])


def test_a_program_can_be_verified_later(converted, batches):
    pytest.importorskip("executorch")
    from pt2e_quant.lowering.executorch import lower_to_executorch

    program = lower_to_executorch(converted, verify=False)
    assert program.verify(converted, batches[:2]).batches == 2


@pytest.mark.parametrize("training", [False, True])
def test_a_dropout_draws_random_numbers_in_training_mode_alone(training):
    """In eval mode it is the identity, and the program is verified."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.3)).train(training)
    graph = torch.export.export(model, (torch.rand(2, 4),)).module()
    result = verified(graph, runs(graph), [(torch.rand(2, 4),)])
    assert result.reason == ("dropout draws random numbers, so no two runs are alike" if training else None)


def test_attention_without_dropout_draws_none():
    def attend(q):
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)

    class Attention(nn.Module):
        def forward(self, q):
            return attend(q)

    q = torch.rand(1, 2, 5, 4)
    graph = torch.export.export(Attention(), (q,)).module()
    assert verified(graph, runs(graph), [(q,)]).reason is None


class WritesToItsInput(nn.Module):
    """In place, through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x[:, 2:].mul_(3)
        return self.layer(x)


def test_a_model_that_writes_to_its_input_is_run_on_the_values_that_it_was_given():
    x = torch.randn(3, 8)
    given, graph = x.clone(), torch.export.export(WritesToItsInput().eval(), (x,)).module()
    verified(graph, runs(graph), [x])
    assert torch.equal(x, given)
    with pytest.raises(LoweringError, match="something else"):
        verified(graph, lambda y: runs(graph)(y / 3), [x])


@pytest.mark.parametrize("runtime", ["executorch", "onnx"])
def test_runtimes_that_leave_the_caller_s_tensors_alone_refuse_such_a_model(runtime):
    pytest.importorskip({"onnx": "onnxscript"}.get(runtime, runtime))
    lower = getattr(importlib.import_module(f"pt2e_quant.lowering.{runtime}"), f"lower_to_{runtime}")
    exported = torch.export.export(WritesToItsInput().eval(), (torch.randn(3, 8),))
    with pytest.raises(LoweringError, match=r"writes to its input 'x'(.|\n)*x = x.clone(.|\n)*mul_"):
        lower(exported)
