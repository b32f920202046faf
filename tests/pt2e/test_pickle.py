"""Pickle, torch.save and deepcopy of prepared and converted models keep outputs, state, report and what comes next."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.errors import CaptureError
from pt2e_quant.graph.pickle import _restore_guards
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.nets import MLP, ConvNet, export

Arguments = tuple[tuple[Tensor, ...], dict[str, Any]]


class Odd(nn.Module):
    """A branch, a buffer that is written to, one that is not saved, keyword arguments, a dictionary and a None."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("total", torch.zeros(4))
        self.register_buffer("weights", torch.linspace(0.5, 2, 4), persistent=False)

    def forward(self, x: Tensor, *, extra: dict[str, Tensor]) -> dict[str, Any]:
        self.total.add_(x.mean(0) * self.weights)
        y = self.linear(x)
        branch = torch.cond(y.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (y,))
        return {"sum": branch + self.total, "rest": (y * extra["scale"], None)}


def conv_net() -> tuple[ExportedProgram, Arguments]:
    x = torch.randn(2, 3, 16, 16)
    return export(ConvNet(), x), ((x,), {})


def free_batch() -> tuple[ExportedProgram, Arguments]:
    x = torch.randn(2, 3, 16, 16)
    shapes = ({0: Dim("batch", min=2, max=7)},)
    return torch.export.export(ConvNet().eval(), (x,), dynamic_shapes=shapes), ((torch.randn(5, 3, 16, 16),), {})


def odd() -> tuple[ExportedProgram, Arguments]:
    x = torch.randn(3, 4)
    arguments = ((x,), {"extra": {"scale": torch.randn(3, 4)}})
    with torch.no_grad():  # or Dynamo warns, while it captures the branch
        return torch.export.export(Odd().eval(), *arguments), arguments


MODELS = {"conv net": conv_net, "free batch": free_batch, "odd": odd}


def unpickled(model: GraphModule) -> GraphModule:
    return pickle.loads(pickle.dumps(model))


def reloaded(model: GraphModule) -> GraphModule:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"pickle": unpickled, "torch.save": reloaded, "deepcopy": copy.deepcopy}


def equal(one: Any, other: Any) -> bool:
    """The same structure, and every tensor bit for bit."""
    leaves, tree = pytree.tree_flatten(one)
    others, other_tree = pytree.tree_flatten(other)
    pairs = zip(leaves, others, strict=True)
    return tree == other_tree and all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def prepare(model: ExportedProgram) -> GraphModule:
    config = get_symmetric_quantization_config(is_per_channel=True)  # histograms, and min-max per channel
    return prepare_pt2e(model, XNNPACKQuantizer(config))


@pytest.fixture(scope="module", params=MODELS)
def stages(request: pytest.FixtureRequest) -> tuple[dict[str, GraphModule], Arguments]:
    torch.manual_seed(0)
    model, (args, kwargs) = MODELS[request.param]()
    prepared = prepare(model)
    for _ in range(2):
        prepared(*args, **kwargs)
    return {"prepared": prepared, "converted": convert_pt2e(prepared)}, (args, kwargs)


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("stage", ["prepared", "converted"])
def test_a_copy_has_the_same_outputs_state_and_report(stages, stage, kind):
    """Users' item 12: pickle and deepcopy of a prepared model keep outputs and reports; of a converted one as well."""
    models, (args, kwargs) = stages
    model = copy.deepcopy(models[stage])  # some write to their buffers
    twin = COPIES[kind](model)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert equal(dict(twin.state_dict()), dict(model.state_dict()))
    assert explain(twin).record.groups == explain(model).record.groups
    assert explain(twin).text() == explain(model).text()
    assert equal(twin(*args, **kwargs), model(*args, **kwargs))
    assert equal(dict(twin.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("kind", COPIES)
def test_calibration_goes_on_in_a_copy_as_it_would_have_in_the_original(stages, kind):
    models, (args, kwargs) = stages
    model = copy.deepcopy(models["prepared"])
    twin = COPIES[kind](model)
    args = tuple(3 * x for x in args)
    for one in (model, twin):
        one(*args, **kwargs)
    assert equal(convert_pt2e(twin)(*args, **kwargs), convert_pt2e(model)(*args, **kwargs))
    assert explain(convert_pt2e(twin)).groups == explain(convert_pt2e(model)).groups


@pytest.mark.parametrize("kind", COPIES)
def test_calibrating_a_copy_leaves_the_original_alone(stages, kind):
    models, (args, kwargs) = stages
    model = copy.deepcopy(models["prepared"])
    before = copy.deepcopy(dict(model.state_dict()))
    COPIES[kind](model)(*(9 * x for x in args), **kwargs)
    assert equal(dict(model.state_dict()), before)


def test_an_unpickled_model_checks_the_shapes_of_its_inputs(stages):
    models, (args, kwargs) = stages
    with pytest.raises(AssertionError, match="Guard failed"):
        unpickled(models["converted"])(*(x[..., :3] for x in args), **kwargs)


def test_an_unpickled_model_is_exported_again_with_its_dynamic_dimensions():
    model, (args, _) = free_batch()
    prepared = prepare(model)
    prepared(*args)
    twin = unpickled(convert_pt2e(unpickled(prepared)))
    again = torch.export.export(twin, args, dynamic_shapes=({0: Dim.AUTO},))
    assert [(r.lower, r.upper) for r in again.range_constraints.values()] == [(2, 7)]


@pytest.mark.slow
def test_an_unpickled_model_lowers_with_the_dynamic_dimensions_that_it_had():
    lowering = pytest.importorskip("pt2e_quant.lowering.executorch")
    pytest.importorskip("executorch")
    x = torch.randn(3, 10)
    prepared = prepare(torch.export.export(MLP().eval(), (x,), dynamic_shapes=({0: Dim("rows", min=2, max=9)},)))
    prepared(x)
    program = lowering.lower_to_executorch(unpickled(convert_pt2e(prepared)))
    unseen = torch.randn(9, 10)
    assert program.delegates == 1
    assert program.run(unseen)[0].shape == (9, 6)


def test_an_unpickled_model_switches_between_training_and_evaluation():
    prepared = prepare(conv_net()[0])
    twin = unpickled(prepared)
    x = torch.randn(2, 3, 16, 16)
    twin.train()
    assert any("dropout" in str(node.target) and node.args[2] is True for node in twin.graph.nodes)
    assert torch.equal(twin.eval()(x), prepared(x))


def test_node_metadata_that_later_steps_read_is_kept():
    model = prepare(conv_net()[0])
    for one, other in zip(model.graph.nodes, unpickled(model).graph.nodes, strict=True):
        assert (one.name, one.op, one.target) == (other.name, other.op, other.target)
        assert one.meta.get("stack_trace") == other.meta.get("stack_trace")
        if isinstance(one.meta.get("val"), Tensor):
            assert one.meta["val"].shape == other.meta["val"].shape
            assert one.meta["val"].dtype == other.meta["val"].dtype


def test_the_pickle_of_another_python_says_what_to_do():
    with pytest.raises(CaptureError, match=r"by Python 3\.8 .*torch\.export\.save"):
        _restore_guards((3, 8), b"")


LOAD: str = textwrap.dedent("""
    import pickle, sys, torch
    with open(sys.argv[1], "rb") as file:
        model, x, expected, text = pickle.load(file)
    import pt2e_quant
    converted = pt2e_quant.convert_pt2e(model)
    print(torch.equal(converted(x), expected), pt2e_quant.explain(model).text() == text)
""")


def test_a_fresh_process_unpickles_a_calibrated_model_and_converts_it_to_the_same(tmp_path):
    x = torch.randn(3, 10)
    prepared = prepare(export(MLP(), x))
    prepared(x)
    path = tmp_path / "prepared.pkl"
    path.write_bytes(pickle.dumps((prepared, x, convert_pt2e(prepared)(x), explain(prepared).text())))
    command = [sys.executable, "-c", LOAD, str(path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["True", "True"]
