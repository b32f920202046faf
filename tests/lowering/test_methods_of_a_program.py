"""Several methods in one .pte: shared buffers and weights, an account for each, and what is refused."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.errors import LoweringError
from pt2e_quant.lowering.executorch import lower_to_executorch
from pt2e_quant.lowering.executorch.program import ExecutorchMethods
from quantizers.cache import CacheQuantizer

pytest.importorskip("executorch")

LENGTH, WIDTH = 12, 64
FIRST = 0.25


class Memory(nn.Module):
    """Puts what it computes of each row into a cache, and returns the sums of what it has there."""

    def __init__(self, length: int = LENGTH) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("cache", torch.full((length, WIDTH), FIRST))

    def forward(self, rows: Tensor, at: Tensor) -> Tensor:
        self.cache.index_copy_(0, at, torch.tanh(self.linear(rows)))
        return self.cache.sum(0, keepdim=True)


class Look(Memory):
    def forward(self, rows: Tensor, at: Tensor) -> Tensor:
        return self.linear(rows) + self.cache.sum(0)


def rows(count: int, first: int = 0) -> tuple[Tensor, Tensor]:
    return torch.randn(count, WIDTH), torch.arange(first, first + count)


def exported(model: nn.Module) -> ExportedProgram:
    sizes = Dim("n", min=1, max=8)
    return torch.export.export(model.eval(), rows(3), dynamic_shapes=({0: sizes}, {0: sizes}))


@pytest.fixture(scope="module")
def graph() -> ExportedProgram:
    with torch.no_grad():
        return exported(Memory())


@pytest.fixture(scope="module")
def program(graph: ExportedProgram) -> ExecutorchMethods:
    return lower_to_executorch(
        {"prefill": graph, "decode": graph}, {"decode": rows(1)}, dynamic_shapes={"decode": ({}, {})}
    )


def test_what_one_method_writes_the_other_reads(program: ExecutorchMethods) -> None:
    """Also where the second method runs first after the first one has written: loading it must not write."""
    program.reset()
    model = Memory()
    calls = [("prefill", rows(5)), ("decode", rows(1, 5)), ("decode", rows(1, 6)), ("prefill", rows(2, 7))]
    with torch.no_grad():
        for name, inputs in calls:
            torch.testing.assert_close(program[name].run(*inputs)[0], model(*inputs), rtol=1e-4, atol=1e-5)
    assert program.shared == ("cache",)


@pytest.mark.parametrize("through", ["the program", "a method"])
def test_reset_gives_buffers_what_they_started_with(program: ExecutorchMethods, through: str) -> None:
    program["prefill"].run(*rows(7))
    (program if through == "the program" else program["decode"]).reset()
    inputs = rows(1)
    expected = torch.tanh(Memory().linear(inputs[0])) + (LENGTH - 1) * FIRST
    torch.testing.assert_close(program["decode"].run(*inputs)[0], expected, rtol=1e-4, atol=1e-5)


def test_weights_of_several_methods_are_stored_once(graph: ExportedProgram, program: ExecutorchMethods) -> None:
    weights = 4 * WIDTH * WIDTH
    assert program["prefill"].sizes.delegates >= weights
    assert program["decode"].sizes.delegates >= weights
    assert weights <= program.sizes.delegates < 2 * weights
    assert len(program.buffer) - len(lower_to_executorch(graph).buffer) < weights / 2


def test_each_method_has_an_account_of_its_own(program: ExecutorchMethods) -> None:
    assert list(program) == ["prefill", "decode"]
    for name, method in program.items():
        assert method.method == name
        assert ("linear", "aten.linear.default") in {(kernel.node, kernel.op) for kernel in method.kernels}
        assert "index_copy_" in {left.node for left in method.undelegated}
    told = json.loads(program.to_json())
    assert told["sizes"]["file"] == len(program.buffer)
    assert told["shared"] == ["cache"]
    assert told["methods"]["decode"] == json.loads(program["decode"].to_json())


def test_reasons_are_those_of_the_method() -> None:
    """The node of one name is taken in one method, and refused for its dynamic size in the other."""

    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(x[:, :4])

    sizes = {0: Dim("n", min=2, max=8)}
    graph = torch.export.export(Half(), (torch.randn(3, 8),), dynamic_shapes=(sizes,))
    program = lower_to_executorch(
        {"some": graph, "fixed": graph}, {"fixed": (torch.randn(3, 8),)}, dynamic_shapes={"fixed": ({},)}
    )
    assert [left.reason for left in program["fixed"].undelegated] == []
    assert ["sizes are dynamic" in left.reason for left in program["some"].undelegated] == [True]


def test_the_summary_names_the_methods_and_the_text_has_each_account(program: ExecutorchMethods) -> None:
    assert str(program).endswith("kB: methods prefill, decode, 1 buffers shared")
    assert program.text().splitlines()[1] == f"prefill: {program['prefill']}"
    assert f"decode: {program['decode']}" in program.text().splitlines()


def test_a_saved_program_runs_in_executorchs_runtime(program: ExecutorchMethods, tmp_path: Any) -> None:
    from executorch.runtime import Runtime

    loaded = Runtime.get().load_program(program.save(tmp_path / "memory.pte"))
    assert {"prefill", "decode"} <= loaded.method_names


@pytest.mark.slow
def test_methods_without_buffers_share_none() -> None:
    graph = torch.export.export(nn.Linear(8, 4).eval(), (torch.randn(2, 8),))
    program = lower_to_executorch({"one": graph, "two": graph})
    x = torch.randn(2, 8)
    assert torch.equal(program["one"].run(x)[0], program["two"].run(x)[0])
    assert program.shared == ()


# --- what is refused --------------------------------------------------------------------------------------------------

ARGUMENTS = {
    "no method": ({}, {}, "there are no methods to lower"),
    "a name": ({"pre fill": None}, {}, "identifiers such as 'prefill', got 'pre fill'"),
    "inputs of no method": ({"a": None}, {"example_inputs": (1,)}, r"dict by method name \(a\), got tuple"),
    "an unknown method": ({"a": None}, {"dynamic_shapes": {"b": None}}, "dynamic_shapes has 'b', the methods are a"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_are_not_by_method_are_refused(name: str) -> None:
    methods, arguments, message = ARGUMENTS[name]
    with pytest.raises(LoweringError, match=message):
        lower_to_executorch(methods, **arguments)


def integers(graph: ExportedProgram, factor: float = 1.0) -> Any:
    """With an integer cache, calibrated with rows of this size."""
    prepared = prepare_pt2e(graph, CacheQuantizer())
    with torch.no_grad():
        prepared(factor * torch.ones(3, WIDTH), torch.arange(3))
        return convert_pt2e(prepared, integer_buffers=["cache"])


def changed(graph: ExportedProgram) -> Any:
    module = copy.deepcopy(graph).module()
    module.cache.fill_(0.5)
    return module


def empty() -> ExportedProgram:
    model = Memory()
    model.cache.zero_()
    return exported(model)


DISAGREEMENTS = {
    "dtype": (lambda: (empty(), integers(empty())), "dtype: torch.float32 and torch.int8"),
    "qparams": (lambda: (integers(empty()), integers(empty(), 0.01)), r"qparams: .*scale=.* and .*scale="),
    "shape": (lambda: (exported(Memory()), exported(Memory(LENGTH + 1))), r"shape: \(12, 64\) and \(13, 64\)"),
    "first values": (lambda: (exported(Memory()), changed(exported(Memory()))), "first values"),
}


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_methods_that_disagree_on_a_buffer_are_refused(name: str) -> None:
    make, message = DISAGREEMENTS[name]
    one, two = make()
    with pytest.raises(LoweringError, match=rf"share buffer 'cache' and disagree on its {message}"):
        lower_to_executorch({"one": one, "two": two}, {"one": rows(3), "two": rows(3)})


def test_a_method_that_only_reads_what_another_writes_is_refused(graph: ExportedProgram) -> None:
    with pytest.raises(LoweringError, match="'write' writes to buffer 'cache', and 'look' only reads it"):
        lower_to_executorch({"write": graph, "look": exported(Look())})
