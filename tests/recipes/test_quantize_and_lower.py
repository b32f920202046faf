"""quantize_and_lower: one call from a float model to a file, with budgets, and errors that say the way out."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from pt2e_quant import explain, prepare_pt2e
from pt2e_quant.errors import CalibrationError, CaptureError, FileError, RecipeError, TargetingError
from pt2e_quant.recipes import Quantized, Recipe, check_saved, quantize_and_lower
from quantizers.onnx_runtime import OnnxRuntimeQuantizer, get_onnx_runtime_quantization_config
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.nets import MLP, ConvNet, randomize

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
DATA = [X, X * 0.5]


def model() -> nn.Module:
    torch.manual_seed(0)
    return randomize(ConvNet()).eval()


@pytest.fixture(scope="module")
def quantized():
    return quantize_and_lower(model(), (X,), DATA, target="onnx")


@pytest.fixture
def saved(quantized, tmp_path):
    quantized.save(tmp_path)
    return tmp_path


def test_model_program_and_report_agree(quantized):
    torch.testing.assert_close(quantized.program(X), quantized.model(X))
    assert {decision.node for decision in quantized.report.quantized} >= {"conv2d", "linear"}
    assert "operators quantized" in str(quantized)


def test_the_same_recipe_gives_the_same_bytes(quantized, saved, tmp_path_factory):
    again = quantize_and_lower(model(), (X,), lambda: iter(DATA), recipe=quantized.recipe)
    other = tmp_path_factory.mktemp("again")
    again.save(other)
    assert check_saved(saved).differences(check_saved(other)) == {}


def test_what_is_saved_stands_in_the_manifest(saved):
    names = {path.name for path in saved.iterdir()}
    reports = {f"report.{kind}" for kind in ("txt", "json", "model_explorer.json", "html")}
    assert names == {"model.onnx", "recipe.yaml", "manifest.json"} | reports
    manifest = json.loads((saved / "manifest.json").read_text())
    assert set(manifest["files"]) == names - {"manifest.json"}
    assert manifest["packages"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.onnx").write_bytes(b"x"), "model.onnx is not the file that was saved"),
        (lambda folder: (folder / "recipe.yaml").unlink(), "cannot read .*recipe.yaml"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "this is no manifest"),
        (lambda folder: (folder / "manifest.json").unlink(), "this is no manifest: cannot read"),
    ],
)
def test_a_folder_that_was_changed_is_found_out(damage, message, saved):
    damage(saved)
    with pytest.raises(RecipeError, match=message):
        check_saved(saved)


def test_a_full_disk_leaves_nothing_behind(quantized, tmp_path, small_disk):
    with pytest.raises(FileError, match="Free some space"):
        quantized.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_ignored_modules_stay_in_float():
    found = quantize_and_lower(model(), (X,), DATA, target="onnx", ignored=["head", "st*"])
    reasons = {decision.node: decision.reason for decision in found.report.skipped}
    assert "kept in float by" in reasons["linear"]
    assert "kept in float by" in reasons["conv2d"]


def test_a_glob_that_matches_nothing_is_an_error():
    with pytest.raises(TargetingError, match="'haed'"):
        quantize_and_lower(model(), (X,), DATA, target="onnx", ignored=["haed"])


class Uneven(nn.Module):
    """One linear with an outlier that a scale for the whole tensor cannot hold, and a harmless one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bad, self.good = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = torch.ones(16)
        weights[0] = 3000.0
        return self.good(torch.tanh(self.bad(x * weights) / 1000))


UNEVEN = torch.randn(8, 16, generator=torch.Generator().manual_seed(2))


def test_a_budget_tries_algorithms_then_leaves_the_worst_operators_in_float():
    def reaching(sqnr: float) -> Quantized:
        return quantize_and_lower(Uneven().eval(), (UNEVEN,), [UNEVEN], target="onnx", sqnr=sqnr, verify=False)

    plain = reaching(5.0)
    improved = reaching(plain.accuracy + 1.0)
    left = reaching(improved.accuracy + 1.0)
    assert (plain.left, plain.tried) == ((), ())
    assert improved.left == ()
    assert [one.kept for one in improved.tried].count(True) > 1
    assert improved.accuracy >= plain.accuracy + 1.0
    assert len(left.left) == 1
    assert left.accuracy >= improved.accuracy + 1.0


def test_a_budget_out_of_reach_says_how_far_it_got():
    with pytest.raises(RecipeError, match=r"in dB, is [\d.]+ at best, with 1 of 2 .*and 300 are wanted"):
        quantize_and_lower(Uneven().eval(), (UNEVEN,), [UNEVEN], target="onnx", sqnr=300.0)


@pytest.mark.slow
def test_a_metric_may_drop_so_much():
    def metric(candidate) -> float:
        return -float((candidate(UNEVEN) - Uneven().eval()(UNEVEN)).abs().mean())

    found = quantize_and_lower(
        Uneven().eval(), (UNEVEN,), [UNEVEN], target="onnx", metric=metric, max_drop=1.0, verify=False
    )
    assert found.accuracy >= -1.0


def test_a_quantizer_of_the_caller_stays_as_it_was():
    quantizer = OnnxRuntimeQuantizer().set_global(get_onnx_runtime_quantization_config(is_dynamic=True))
    x = torch.randn(3, 10)
    found = quantize_and_lower(MLP().eval(), (x,), target=quantizer, ignored=["up"])
    assert found.recipe is None
    assert [kernel.precision for kernel in found.program.kernels] == ["dynamic"]
    assert quantizer._targets.module_names == {}


def test_a_copied_quantizer_knows_its_reasons():
    """They look for ops of the pattern by identity."""
    quantizer = copy.deepcopy(XNNPACKQuantizer().set_global(get_symmetric_quantization_config()))
    assert explain(prepare_pt2e(torch.export.export(model(), (X,)), quantizer)).quantized


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"data": None}, CalibrationError, r"needs calibration data: pass data=\[batch"),
        ({"data": []}, CalibrationError, "there is no batch"),
        ({"data": X}, CalibrationError, r"for a single batch, pass \[batch\]"),
        ({"data": [torch.randn(2, 3, 16)]}, CalibrationError, r"(?s)failed on this batch.*exported for x: float32"),
        ({"mode": "qat"}, RecipeError, "needs a training loop.*prepare_qat_pt2e"),
        ({"mode": "statik"}, RecipeError, "has no mode 'statik'. Did you mean 'static'"),
        ({"target": "onyx"}, RecipeError, "unknown target 'onyx'. Did you mean 'onnx'"),
        ({"options": {"range": 1}}, RecipeError, "unknown option 'range'"),
        ({"observer": "mnmax"}, RecipeError, "unknown observer 'mnmax'. Did you mean 'minmax'"),
        ({"metric": len}, RecipeError, "metric= with max_drop="),
        ({"example_inputs": None}, CaptureError, "pass example_inputs="),
        ({"model": ConvNet()}, CaptureError, "call model.eval()"),
        ({"model": 3}, CaptureError, "takes an nn.Module or an ExportedProgram, got int"),
        ({"mode": "dynamic", "observer": "mse"}, RecipeError, "observes no activations"),
    ],
)
def test_wrong_arguments_say_the_way_out(arguments, error, message):
    standard = {"model": model(), "example_inputs": (X,), "data": DATA, "target": "onnx", "verify": False}
    with pytest.raises(error, match=message):
        quantize_and_lower(**{**standard, **arguments})


def test_an_observer_is_chosen_by_name():
    found = Recipe(target="xnnpack", observer="percentile").configuration()
    assert found.input_activation.observer_or_fake_quant_ctr.__name__ == "PercentileObserver"


@pytest.mark.parametrize("fields", [{"target": "onnx", "seed": True}, {"target": "onnx", "ignored": "head"}])
def test_a_value_of_another_kind_is_refused(fields):
    with pytest.raises(RecipeError, match="must be"):
        Recipe(**fields)


def test_a_bare_tensor_is_no_tuple_of_inputs():
    """tuple(x) would be the rows of the batch, and a batch of one a model of another shape."""
    with pytest.raises(CaptureError, match=r"example_inputs are a tuple, such as \(x,\); got Tensor"):
        quantize_and_lower(model(), X, DATA, target="onnx")
