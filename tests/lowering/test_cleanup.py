"""Passes before lowering change the graph as they say, and no value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import Dim
from torch.fx import GraphModule

from pt2e_quant.graph.module import clone, finish
from pt2e_quant.lowering.executorch.passes.parts_to_slices import parts_to_slices
from pt2e_quant.lowering.executorch.passes.reshapes_to_views import reshapes_to_views
from pt2e_quant.ops import op_name
from pt2e_quant.passes.cancel_requantize import cancel_requantize
from pt2e_quant.passes.own_storage import own_storage
from pt2e_quant.passes.remove_identities import remove_identities
from tests.lowering.handmade import Body, Grid, Q

A, B, NARROW = Grid(0.03, -5), Grid(0.04, 3), Grid(0.03, -5, -100, 100)


def after(pass_: Callable[[GraphModule], GraphModule], body: Any, *inputs: Tensor, **export: Any) -> list[str]:
    """Names of the operators after the pass; the values are checked on the way."""
    model = body if isinstance(body, Body) else Body(lambda m, x: body(x))
    original = torch.export.export(model.eval(), inputs, **export).module()
    changed = clone(original)
    pass_(changed)
    finish(changed)
    torch.testing.assert_close(changed(*inputs), original(*inputs), rtol=0, atol=0)
    return [op_name(node) for node in changed.graph.nodes if node.op == "call_function"]


X = torch.linspace(-2, 2, 24).reshape(2, 3, 4)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.relu(F.dropout(x, 0.4, training=False)),
        lambda x: F.relu(F.relu(x).detach()),
        lambda x: F.relu(F.relu(x).clone()),
        lambda x: F.relu(F.relu(x).to(torch.float32)),
        lambda x: F.relu(F.relu(x).expand(2, 3, 4)),
        lambda x: F.relu(F.relu(x)[:]),
    ],
)
def test_what_computes_nothing_is_removed(function: Callable[[Tensor], Tensor]) -> None:
    assert set(after(remove_identities, function, X)) == {"relu"}


@pytest.mark.parametrize(
    ("function", "kept"),
    [
        (lambda x: F.relu(F.dropout(x, 0.0, training=True)), "dropout"),
        (lambda x: F.relu(x).to(torch.float64), "to"),
        (lambda x: F.relu(x)[:, :2], "slice"),
        (lambda x: F.relu(x).transpose(0, 1).contiguous(), "contiguous"),
        (lambda x: F.relu(x).clone().mul_(2) + F.relu(x), "clone"),  # survives the write to the copy
        (lambda x: (x.detach(), F.relu(x)), "detach"),  # a graph that returns its own input is another graph
    ],
)
def test_what_computes_something_stays(function: Callable[[Tensor], Any], kept: str) -> None:
    assert kept in after(remove_identities, function, X)


def test_quantizing_again_on_the_same_grid_is_cancelled() -> None:
    assert after(cancel_requantize, lambda x: A(F.relu(A(A(x)))), X) == [
        *("quantize_per_tensor", "dequantize_per_tensor", "relu"),
        *("quantize_per_tensor", "dequantize_per_tensor"),
    ]


def test_every_code_survives_being_quantized_again() -> None:
    codes = torch.arange(-128, 128, dtype=torch.int8)
    for scale in (1e-6, 0.03, 0.1, 7.3):
        grid = Grid(scale, 17)
        assert torch.equal(grid.quantize(grid.dequantize(codes)), codes)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: B(A(x)),  # another grid
        lambda x: Q.dequantize_per_tensor.default(
            NARROW.quantize(A(x)), 0.03, -5, -100, 100, torch.int8
        ),  # other bounds
    ],
)
def test_quantizing_on_another_grid_stays(function: Callable[[Tensor], Tensor]) -> None:
    assert after(cancel_requantize, function, 10 * X).count("quantize_per_tensor") == 2


def test_integers_from_outside_that_may_exceed_the_bounds_are_clamped_again() -> None:
    body = Body(lambda m, q: NARROW.quantize(NARROW.dequantize(q)))
    assert len(after(cancel_requantize, body, torch.arange(-128, 127, dtype=torch.int8))) == 2


def test_views_of_larger_buffers_get_a_storage_of_their_own() -> None:
    whole = torch.randn(8, 4)
    body = Body(lambda m, x: x + m.part + m.turned, part=whole[5:6], turned=torch.randn(4, 3).t())
    gm = clone(torch.export.export(body, (X,)).module())
    own_storage(gm)
    for value in gm.buffers():
        assert value.is_contiguous()
        assert value.untyped_storage().nbytes() == 4 * value.numel()
    assert not body.turned.is_contiguous()  # the caller's tensors are left alone
    assert gm.get_buffer("part").equal(whole[5:6])


@pytest.mark.parametrize(
    ("function", "ops"),
    [
        (lambda x: x.unsqueeze(1), ["view"]),
        (lambda x: x[:, :1].squeeze(1), ["slice", "view"]),
        (lambda x: x.flatten(1), ["reshape"]),
        (lambda x: x.transpose(0, 1).unsqueeze(0), ["transpose", "view"]),
    ],
)
def test_shapes_become_literals(function: Callable[[Tensor], Tensor], ops: list[str]) -> None:
    assert after(reshapes_to_views, function, X) == ops


def test_one_unknown_size_is_written_as_minus_one() -> None:
    body = Body(lambda m, x: x.reshape(x.shape[0], -1))
    gm = clone(torch.export.export(body, (X,), dynamic_shapes=[({0: Dim("rows", max=9)},)]).module())
    reshapes_to_views(gm)
    (view,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default)
    assert view.args[1] == [-1, 12]
    assert view.args[0].target is torch.ops.aten.contiguous.default  # a view of any layout


def test_two_unknown_sizes_are_left_alone() -> None:
    shapes = [({0: Dim("rows", max=9), 1: Dim("columns", max=9)},)]
    assert after(reshapes_to_views, lambda x: x.unsqueeze(1), X, dynamic_shapes=shapes) == ["unsqueeze"]


@pytest.mark.parametrize(
    ("function", "slices"),
    [
        (lambda x: x[:, -1], 1),
        (lambda x: torch.cat(x.split([1, 2], 1)[::-1], 1), 2),
        (lambda x: x.chunk(2, -1)[1], 1),
        (lambda x: torch.cat(x.unbind(2), 1), 4),
    ],
)
def test_parts_become_slices(function: Callable[[Tensor], Tensor], slices: int) -> None:
    ops = after(parts_to_slices, function, X)
    assert ops.count("slice") == slices
    assert set(ops) <= {"slice", "reshape", "cat"}


def test_between_quantize_and_dequantize_every_slice_has_its_own() -> None:
    ops = after(parts_to_slices, lambda x: torch.cat([A(part) for part in A(x).split([1, 2], 1)], 1), X)
    assert ops.count("quantize_per_tensor") == 3
    assert ops.count("dequantize_per_tensor") == 4  # one for each slice, one for each operand of cat


def test_a_value_that_is_returned_twice_keeps_its_copies():
    """The body of a loop must not return one memory twice: torch refuses it."""
    body = Body(lambda m, x: (lambda y: (y, y.clone(), y.detach().clone()))(F.relu(x)))
    gm = remove_identities(clone(torch.export.export(body.eval(), (X,)).module()))
    assert len({value.data_ptr() for value in finish(gm)(X)}) == 3
