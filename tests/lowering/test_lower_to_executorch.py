"""The call itself: what it takes, what it returns, and what it says when something does not fit."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from pt2e_quant.errors import CaptureError, FileError, LoweringError
from pt2e_quant.lowering.executorch import lower_to_executorch
from pt2e_quant.lowering.executorch.program import ExecutorchProgram
from tests.lowering.handmade import Body, Grid, Weight, bias, per_token

pytest.importorskip("executorch")

IN, OUT = Grid(0.03, -5), Grid(0.04, 3)


class Mixed(nn.Module):
    """An integer convolution, a float operator that XNNPACK has, and one that it has not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = Body(lambda m, x: OUT(F.relu(F.conv2d(IN(x), m.w(), m.b))), w=Weight((7, 6, 3, 3)), b=bias(7))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(torch.sigmoid(self.conv(x)), 1)


@pytest.fixture(scope="module")
def exported() -> torch.export.ExportedProgram:
    torch.manual_seed(0)
    return torch.export.export(Mixed().eval(), (torch.randn(2, 6, 8, 10),))


@pytest.fixture(scope="module")
def program(exported: torch.export.ExportedProgram) -> ExecutorchProgram:
    return lower_to_executorch(exported)


# --- the value --------------------------------------------------------------------------------------------------------


def test_every_operator_outside_has_its_node_module_line_and_reason(program: ExecutorchProgram) -> None:
    (left,) = program.undelegated
    assert (left.node, left.op, left.module) == ("cumsum", "aten.cumsum.default", "")
    assert left.source is not None
    assert left.source.endswith("return torch.cumsum(torch.sigmoid(self.conv(x)), 1)")
    assert left.reason == "XNNPACK has no kernel for aten.cumsum.default"


def test_every_operator_inside_has_its_arithmetic(program: ExecutorchProgram) -> None:
    assert [(kernel.node, kernel.precision, kernel.delegate) for kernel in program.kernels] == [
        ("conv2d", "int8", 0),
        ("relu", "int8", 0),
        ("sigmoid", "float", 0),
    ]
    assert program.delegates == 1


def test_the_summary_is_one_line_and_the_text_has_the_rest(program: ExecutorchProgram) -> None:
    assert "3 operators in 1 delegate (2 int8, 1 float), 1 outside" in str(program)
    assert "\n" not in str(program)
    lines = program.text().splitlines()
    assert lines[0] == str(program)
    assert any(line.startswith("  cumsum (aten.cumsum.default), test_lower_to_executorch.py:") for line in lines)
    assert "  sigmoid (aten.sigmoid.default)" in lines


def test_json_holds_everything_but_the_bytes(program: ExecutorchProgram) -> None:
    told = json.loads(program.to_json())
    assert told["delegates"] == 1
    assert told["sizes"]["file"] == len(program.buffer)
    assert told["undelegated"][0]["node"] == "cumsum"
    assert [kernel["precision"] for kernel in told["kernels"]] == ["int8", "int8", "float"]


def test_the_value_is_frozen(program: ExecutorchProgram) -> None:
    with pytest.raises(AttributeError):
        program.delegates = 2  # type: ignore[misc]


def test_integer_weights_make_a_smaller_file() -> None:
    x = torch.randn(3, 256)
    quantized = Body(lambda m, x: OUT(F.linear(IN(x), m.w())), w=Weight((256, 256)))
    small = lower_to_executorch(torch.export.export(quantized.eval(), (x,)))
    large = lower_to_executorch(torch.export.export(nn.Linear(256, 256, bias=False).eval(), (x,)))
    assert len(small.buffer) <= 0.3 * len(large.buffer)
    assert 256 * 256 <= small.sizes.delegates <= small.sizes.file
    assert 4 * 256 * 256 <= large.sizes.delegates <= large.sizes.file
    assert large.count("float") == len(large.kernels) == 1


def test_save_replaces_the_file_as_a_whole(program: ExecutorchProgram, tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    path.write_bytes(b"old")
    assert program.save(path) == path
    assert path.read_bytes() == program.buffer
    assert list(tmp_path.iterdir()) == [path]


def test_save_leaves_nothing_behind_when_it_fails(program: ExecutorchProgram, tmp_path: Path) -> None:
    target = tmp_path / "directory"
    target.mkdir()
    with pytest.raises(FileError, match=r"cannot write .*directory: Is a directory"):
        program.save(target)
    assert list(tmp_path.iterdir()) == [target]


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_run_takes_arguments_as_the_model_does() -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor, pair: tuple[Tensor, Tensor], *, scale: Tensor, shift: Tensor) -> dict[str, Tensor]:
            return {"sum": F.relu(x + pair[0]) * scale, "difference": pair[1] - shift}

    args = (torch.randn(3, 4), (torch.randn(3, 4), torch.randn(3, 4)))
    kwargs = {"scale": torch.randn(4), "shift": torch.randn(4)}
    program = lower_to_executorch(torch.export.export(Named(), args, kwargs))
    expected = Named()(*args, **kwargs)
    turned = dict(reversed(kwargs.items()))
    for got, wanted in zip(program.run(*args, **turned), expected.values(), strict=True):
        torch.testing.assert_close(got, wanted)
    called = program(*args, **kwargs)  # what the model returns, as programs of other backends do
    torch.testing.assert_close(called, expected)
    with pytest.raises(LoweringError, match="3 positional tensors and keywords scale, shift"):
        program.run(*args)


def test_a_wrong_size_is_an_error_that_shows_the_shapes(program: ExecutorchProgram) -> None:
    with pytest.raises(LoweringError, match=r"failed on inputs \(2, 6, 8, 11\)"):
        program.run(torch.randn(2, 6, 8, 11))


def test_inputs_need_not_be_contiguous(program: ExecutorchProgram, exported: torch.export.ExportedProgram) -> None:
    x = torch.randn(2, 8, 10, 6).permute(0, 3, 1, 2)
    # sigmoid moves by at most a quarter of a step of its input, and seven of them are summed
    assert (program.run(x)[0] - exported.module()(x)).abs().max() <= 7 * OUT.scale / 4


def test_the_module_of_an_export_needs_example_inputs(exported: torch.export.ExportedProgram) -> None:
    with pytest.raises(LoweringError, match="holds no example inputs"):
        lower_to_executorch(exported.module())
    with pytest.raises(LoweringError, match="must be a tuple"):
        lower_to_executorch(exported.module(), torch.randn(2, 6, 8, 10))  # type: ignore[arg-type]


def test_example_inputs_that_do_not_fit_are_an_error(exported: torch.export.ExportedProgram) -> None:
    with pytest.raises(LoweringError, match=r"torch\.export cannot export the converted graph again"):
        lower_to_executorch(exported.module(), (torch.randn(2, 5, 8, 10),))


def test_a_plain_module_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"the nn\.Module Linear"):
        lower_to_executorch(nn.Linear(2, 2), (torch.randn(1, 2),))  # type: ignore[arg-type]


def test_a_graph_with_observers_is_refused(exported: torch.export.ExportedProgram) -> None:
    module = exported.module()
    conv = next(iter(module.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default)))
    module.add_submodule("activation_post_process_0", nn.Identity())
    with module.graph.inserting_after(conv):
        module.graph.call_module("activation_post_process_0", (conv,))
    with pytest.raises(CaptureError, match="convert_pt2e first"):
        lower_to_executorch(module, (torch.randn(2, 6, 8, 10),))


def test_an_unknown_backend_is_refused(exported: torch.export.ExportedProgram) -> None:
    with pytest.raises(LoweringError, match="backend must be one of 'xnnpack' or None, got 'coreml'"):
        lower_to_executorch(exported, backend="coreml")  # type: ignore[arg-type]


def test_without_executorch_the_error_says_how_to_install_it(
    exported: torch.export.ExportedProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    with pytest.raises(LoweringError, match=r'pip install "pt2e_quant\[executorch\]"'):
        lower_to_executorch(exported)


# --- backends and surroundings ----------------------------------------------------------------------------------------


def test_without_a_backend_everything_runs_in_portable_kernels(exported: torch.export.ExportedProgram) -> None:
    program = lower_to_executorch(exported, backend=None)
    assert (program.delegates, program.kernels) == (0, ())
    assert {left.reason for left in program.undelegated} == {"no backend was asked for"}
    assert {"conv2d", "quantize_per_tensor", "dequantize_per_channel", "cumsum"} <= {
        n.node for n in program.undelegated
    }
    x = torch.randn(2, 6, 8, 10)
    torch.testing.assert_close(program.run(x)[0], exported.module()(x), rtol=1e-4, atol=7 * OUT.scale / 4)


def test_the_callers_graph_and_loggers_stay_as_they_were(exported: torch.export.ExportedProgram) -> None:
    module = exported.module()
    before, custom = module.code, [node.meta.get("custom") for node in module.graph.nodes]
    state = {name: value.clone() for name, value in module.state_dict().items()}
    handlers, level = list(logging.root.handlers), logging.root.level
    lower_to_executorch(module, (torch.randn(2, 6, 8, 10),))
    assert module.code == before
    assert [node.meta.get("custom") for node in module.graph.nodes] == custom
    assert module.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert (list(logging.root.handlers), logging.root.level) == (handlers, level)


def test_a_tensor_of_an_unknown_dtype_is_named_in_the_reason() -> None:
    body = Body(lambda m, x: F.relu(x) + 2)
    program = lower_to_executorch(torch.export.export(body, (torch.arange(6, dtype=torch.int32),)))
    assert any("dtype int32" in left.reason for left in program.undelegated)


# --- sizes that are known when the program runs -----------------------------------------------------------------------


def relu_linear() -> Body:
    return Body(lambda m, x: OUT(F.relu(F.linear(IN(x), m.w(), m.b))), w=Weight((5, 10)), b=bias(5))


def test_ranges_of_an_exported_program_are_kept_even_with_an_example_of_one_row() -> None:
    body = relu_linear()
    sizes = {0: Dim("rows", min=1, max=32)}
    exported = torch.export.export(body.eval(), (torch.randn(3, 10),), dynamic_shapes=[(sizes,)])
    program = lower_to_executorch(exported.module(), (torch.randn(1, 10),))
    for rows in (1, 7, 32):
        x = torch.randn(rows, 10)
        assert program.run(x)[0].shape == (rows, 5)
        assert (program.run(x)[0] - body(x)).abs().max() <= 1.01 * OUT.scale
    with pytest.raises(LoweringError, match="Sizes must lie within"):
        program.run(torch.randn(33, 10))


def test_sizes_that_depend_on_each_other_stay_so() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor, *, y: Tensor) -> Tensor:
            return F.relu(x + y[::2])

    rows = Dim("rows", min=2, max=16)
    exported = torch.export.export(
        Pair(), (torch.randn(4, 3),), {"y": torch.randn(8, 3)}, dynamic_shapes={"x": {0: rows}, "y": {0: 2 * rows}}
    )
    program = lower_to_executorch(exported.module(), (torch.randn(1, 3),), example_kwargs={"y": torch.randn(2, 3)})
    x, y = torch.randn(5, 3), torch.randn(10, 3)
    torch.testing.assert_close(program.run(x, y=y)[0], Pair()(x, y=y))


def test_a_size_without_an_upper_bound_is_refused_and_named() -> None:
    body = relu_linear()
    exported = torch.export.export(body.eval(), (torch.randn(3, 10),), dynamic_shapes=[({0: Dim("rows")},)])
    with pytest.raises(LoweringError, match=r"needs an upper bound.*\n  input inputs_0, dimension 0"):
        lower_to_executorch(exported)
    program = lower_to_executorch(exported, dynamic_shapes=[{0: Dim("rows", max=9)}])
    assert program.run(torch.randn(9, 10))[0].shape == (9, 5)


def test_a_decoder_of_any_length_runs_per_token() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = F.linear(per_token(x), m.w()).split(8, -1)
        return F.softmax(q @ k.transpose(-1, -2), -1) @ v

    body = Body(forward, w=Weight((24, 16)))
    sizes = {1: Dim("length", min=2, max=64)}
    program = lower_to_executorch(torch.export.export(body.eval(), (torch.randn(1, 5, 16),), dynamic_shapes=[(sizes,)]))
    x = torch.randn(1, 23, 16)
    torch.testing.assert_close(program.run(x)[0], body(x), rtol=1e-4, atol=1e-5)
    assert program.count("dynamic") == 1
