"""A budget of size or latency in one call: formats that meet it, a recipe that repeats, refusals with their place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pt2e_quant.errors import CalibrationError, QuantizationError, RecipeError
from pt2e_quant.recipes import Recipe, check_saved, quantize_and_lower, read_recipe
from pt2e_quant.recipes.targets import Lowering
from quantizers.onnx_runtime import OnnxRuntimeQuantizer, get_onnx_runtime_quantization_config
from tests.debug.test_mixed_precision import Clocked
from tests.nets import sqnr

pytest.importorskip("scipy")
pytest.importorskip("onnxruntime")

ROWS = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
WEIGHTS = 64 * 128 + 128 * 32
PER_CHANNEL = 128 + 32
SECONDS = 1e6


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32)).eval()


@pytest.fixture(scope="module")
def sized():
    return quantize_and_lower(model(), (ROWS,), [ROWS], target="onnx", size=WEIGHTS, verify=False)


def test_a_budget_of_size_is_met_and_the_recipe_names_the_choice(sized):
    assert sized.search.trials[0].size <= WEIGHTS < WEIGHTS + 4 * PER_CHANNEL == sized.search.trials[2].size
    assert sized.recipe.size is None
    assert sized.recipe.precisions == dict(sized.search.precisions.formats)
    assert set(sized.recipe.precisions.values()) == {"int8", "int4"}
    assert sqnr(model()(ROWS), sized.model(ROWS)) == pytest.approx(sized.search.trials[0].value, abs=1e-4)
    assert "integer program" in str(sized)


def test_the_recipe_that_was_saved_makes_the_same_bytes(sized, tmp_path, tmp_path_factory):
    sized.save(tmp_path)
    other = tmp_path_factory.mktemp("again")
    recipe = read_recipe(tmp_path / "recipe.yaml")
    quantize_and_lower(model(), (ROWS,), [ROWS], recipe=recipe, verify=False).save(other)
    assert check_saved(tmp_path).differences(check_saved(other)) == {}


def test_a_budget_of_latency_goes_where_the_time_goes(monkeypatch):
    monkeypatch.setattr(Lowering, "__call__", lambda self, graph, **more: Clocked(graph))
    recipe = Recipe(target="xnnpack", latency=75.0)
    found = quantize_and_lower(model(), (ROWS,), [ROWS], recipe=recipe)
    assert found.search.trials[0].latency == 20 + 40 + 10
    assert sorted(found.recipe.precisions.values()) == ["float", "int8"]
    assert found.recipe.latency is None


@pytest.mark.slow
def test_a_budget_of_latency_is_timed_in_the_program_of_the_target():
    found = quantize_and_lower(model(), (ROWS,), [ROWS], target="onnx", latency=SECONDS, verify=False)
    assert set(found.recipe.precisions.values()) == {"float"}  # the most accurate, since there is time for everything
    assert found.recipe.latency is None
    assert all(0 < trial.latency < SECONDS for trial in found.search.trials)


def test_a_budget_out_of_reach_says_how_near_it_came():
    with pytest.raises(QuantizationError, match=r"no choice meets Budget\(.*at best, integer program .* bytes"):
        quantize_and_lower(model(), (ROWS,), [ROWS], target="onnx", size=100)


def test_a_quantizer_of_the_caller_gets_the_choice():
    quantizer = OnnxRuntimeQuantizer().set_global(get_onnx_runtime_quantization_config())
    found = quantize_and_lower(model(), (ROWS,), [ROWS], target=quantizer, size=WEIGHTS, verify=False)
    assert found.recipe is None
    assert "int4" in found.search.precisions.formats.values()


def test_formats_are_chosen_on_data():
    with pytest.raises(CalibrationError, match=r"pass data=\[batch"):
        quantize_and_lower(model(), (ROWS,), target="onnx", mode="dynamic", size=WEIGHTS)


def test_one_budget_is_enough():
    with pytest.raises(RecipeError, match="there is one budget"):
        quantize_and_lower(model(), (ROWS,), [ROWS], target="onnx", size=10, metric=len, max_drop=1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("target: onnx\nsqnr: 30\nlatency: 100", "recipe.yaml:3: a recipe has one budget, and this one has sqnr and"),
        ("target: x86\nlatency: 100", "recipe.yaml:2: nothing tells the time of single operators on target 'x86': the"),
        ("target: arm_inductor\nlatency: 9", "on target 'arm_inductor': its programs are made elsewhere"),
        ("target: cache\nsize: 9", "recipe.yaml:2: a budget of size chooses among formats, and the quantizer of 'cach"),
        ("target: onnx\nsize: 9\nprecisions: {a: int4}", "recipe.yaml:2: a budget of size chooses the formats, and"),
        ("target: onnx\nsize: 1.5", "recipe.yaml:2: size: it is 1.5, not int"),
    ],
)
def test_what_cannot_be_is_said_with_file_and_line(text, message, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError) as raised:
        read_recipe(tmp_path / "recipe.yaml")
    assert message in str(raised.value)


def test_a_budget_reads_back_from_a_file(tmp_path):
    for recipe in (Recipe(target="x86", size=1000), Recipe(target="xnnpack", latency=250.0)):
        (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
        assert read_recipe(tmp_path / "recipe.yaml") == recipe


def test_one_call_says_where_dynamic_activations_are_better():
    """A batch that reaches far leaves the first one few steps of a static grid."""
    net = nn.Linear(64, 8).eval()
    far = quantize_and_lower(net, (ROWS,), [ROWS, ROWS * 100], target="onnx", verify=False)
    near = quantize_and_lower(net, (ROWS,), [ROWS, ROWS * 0.9], target="onnx", verify=False)
    assert "take mode 'dynamic'" in str(far)
    assert "so quantize dynamically" in far.report.text()
    assert "take mode 'dynamic'" not in str(near)


@pytest.mark.parametrize(
    ("first", "second"), [("int4", "int4"), ("int8", "int4"), ("int4", "int8")], ids=lambda name: name
)
def test_4_bits_beside_activations_and_integers_have_their_kernel_in_onnxruntime(first, second):
    """A product that was joined with its bias, activation or neighbours to a Gemm ran in float."""
    recipe = Recipe(target="onnx", precisions={"linear": first, "linear_1": second})
    found = quantize_and_lower(model(), (ROWS,), [ROWS], recipe=recipe)
    kernels = {"int4": "MatMulNBits", "int8": "QGemm"}
    assert [kernel.kernel for kernel in found.program.kernels] == [kernels[first], kernels[second]]
    assert sqnr(found.model(ROWS), found.program(ROWS)) > 45.0  # a step of the output grid apart, at most
