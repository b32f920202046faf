"""pt2e-quant on files: a folder that can be made again, and one line with the way out for all that can go wrong."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pt2e_quant.cli import main, quantizing
from pt2e_quant.cli.sources import load_data, load_model
from pt2e_quant.recipes import Quantized
from tests.nets import MLP, randomize


class Pair(nn.Module):
    """Two inputs of different types."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(9, 10), nn.Linear(10, 4)

    def forward(self, x, ids):
        return self.linear(x + self.table(ids))


def net() -> tuple[nn.Module, tuple[torch.Tensor]]:
    torch.manual_seed(0)
    return randomize(MLP()).eval(), (torch.randn(4, 10),)


def large() -> tuple[nn.Module, tuple[torch.Tensor]]:
    return MLP(500).eval(), (torch.randn(4, 10),)


def batches() -> list[torch.Tensor]:
    return [torch.randn(4, 10, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


def undefined() -> object:
    return not_there  # noqa: F821


def stops() -> object:
    sys.exit(5)


def failing():
    yield torch.randn(4, 10)
    raise KeyError("x")


def bare() -> tuple[nn.Module, torch.Tensor]:
    """The usual slip: no tuple around the input."""
    return MLP().eval(), torch.randn(1, 10)


def training() -> tuple[nn.Module, tuple[torch.Tensor]]:
    return MLP().train(), (torch.randn(4, 10),)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model.pt2, pair.pt2 and inputs.npz."""
    place = tmp_path_factory.mktemp("models")
    model, inputs = net()
    torch.export.save(torch.export.export(model, inputs), place / "model.pt2")
    torch.export.save(torch.export.export(Pair().eval(), (torch.randn(2, 10), torch.arange(2))), place / "pair.pt2")
    np.savez(place / "inputs.npz", x=np.random.default_rng(0).normal(size=(12, 10)).astype(np.float32))
    return place


@pytest.fixture
def run(folder, tmp_path, monkeypatch, capsys):
    """Runs a command in a folder with links to the files; the exit code, what it printed, and its complaint."""
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pt2e-quant", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        told = capsys.readouterr()
        return int(stop.value.code or 0), told.out, told.err

    return command


QUANTIZE = ("quantize", "model.pt2", "--data", "inputs.npz", "--target", "onnx")


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory):
    """The folder of one run of `quantize`."""
    out = tmp_path_factory.mktemp("out") / "quantized"
    quantizing.quantize_model(
        str(folder / "model.pt2"),
        str(folder / "inputs.npz"),
        out,
        quantizing.recipe_of(None, {"target": "onnx", "seed": 3}, ["reduce_range=true"]),
        as_json=False,
    )
    return out


def test_quantize_writes_artefact_report_recipe_and_manifest(run, tmp_path):
    code, out, _ = run(*QUANTIZE, "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["artefact"], told["in_float"]) == ("quantized/model.onnx", 0)
    assert {path.name for path in (tmp_path / "quantized").iterdir()} == {
        "model.onnx", "report.txt", "report.json", "report.model_explorer.json", "report.html", "recipe.yaml",
        "manifest.json",
    }  # fmt: skip


def test_verify_makes_the_same_bytes_again(run, written):
    code, out, _ = run("verify", str(written))
    assert (code, out) == (0, f"{written}: all files are as saved; made again: the same bytes\n")


@pytest.mark.slow
def test_verify_tells_another_model_from_that_of_the_manifest(run, written):
    code, _, told = run("verify", str(written), "--model", "tests.cli.test_commands:other")
    assert code == 2
    assert "model (" in told
    assert "All versions are those of the manifest." in told


def other() -> tuple[nn.Module, tuple[torch.Tensor]]:
    model, inputs = net()
    with torch.no_grad():
        model.down.weight.mul_(2)
    return model, inputs


def test_options_reach_the_recipe_that_is_saved(written):
    text = (written / "recipe.yaml").read_text()
    assert 'options: {"reduce_range": true}' in text
    assert "seed: 3" in text


def test_a_recipe_is_overridden_by_options(tmp_path):
    (tmp_path / "r.yaml").write_text("target: xnnpack\nsqnr: 20\n")
    found = quantizing.recipe_of(tmp_path / "r.yaml", {"target": "onnx", "sqnr": None, "ignored": ()}, [])
    assert (found.target, found.sqnr) == ("onnx", 20.0)


@pytest.mark.slow
def test_functions_give_models_and_data(run):
    code, out, _ = run(
        "quantize", "tests.cli.test_commands:net", "--data", "tests.cli.test_commands:batches", "--target", "onnx"
    )
    assert code == 0
    assert "3 operators quantized" in out


def test_bench_stands_beside_the_float_model(run, written):
    code, out, _ = run(
        "bench", "model.pt2", str(written / "model.onnx"), "--data", "inputs.npz", "--runs", "2", "--json"
    )
    float_row, row = json.loads(out, parse_constant=pytest.fail)  # strict readers know no Infinity
    assert code == 0
    assert (float_row["speed"], row["bytes"]) == (1.0, (written / "model.onnx").stat().st_size)
    assert row["sqnr"] > 25


def test_compare_ranks_tensors(run):
    code, out, _ = run("compare", "model.pt2", "--data", "inputs.npz", "--target", "onnx", "--json")
    assert code == 0
    assert {"linear", "linear_1"} <= {row["node"] for row in json.loads(out)["nodes"]}


def test_sensitivity_ranks_layers(run):
    code, out, _ = run("sensitivity", "model.pt2", "--data", "inputs.npz", "--target", "onnx")
    assert code == 0
    assert "one layer quantized, first order" in out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnx", "xnnpack"])
def test_check_quantizer_finds_nothing_in_ours(run, name):
    code, out, _ = run("check-quantizer", name)
    assert (code, out) == (0, f"{name}, static: no rule is broken\n")


@pytest.mark.parametrize("command", ["quantize", "verify", "explain", "compare", "sensitivity", "bench", "list"])
def test_help_has_an_example(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"Example: pt2e-quant {command}" in " ".join(out.split())


def _truncated(path):
    content = (path / "model.pt2").read_bytes()
    (path / "cut.pt2").write_bytes(content[: len(content) // 2])


def _text(path):
    (path / "cut.pt2").write_text("no model")


def _npz(**arrays):
    return lambda path: np.savez(path / "bad.npz", **arrays)


def _cut_npz(path):
    (path / "bad.npz").write_bytes((path / "inputs.npz").read_bytes()[:80])


def _recipe(text):
    return lambda path: (path / "r.yaml").write_text(text)


X = np.zeros((4, 10), np.float32)
LINE = undefined.__code__.co_firstlineno + 1


@pytest.mark.parametrize(
    ("before", "arguments", "message"),
    [
        (None, ("nothing.pt2",), "CaptureError: cannot read nothing.pt2: No such file or directory"),
        (_truncated, ("cut.pt2",), "CaptureError: cut.pt2: this file is damaged"),
        (_text, ("cut.pt2",), "CaptureError: cut.pt2: this is no file of torch.export.save"),
        (None, ("tests.cli.test_commands:nothing",), "CaptureError: tests.cli.test_commands:nothing: AttributeError"),
        (None, ("no_such_module:net",), "CaptureError: no_such_module:net: ModuleNotFoundError"),
        (None, ("tests.cli.test_commands:batches",), "CaptureError: tests.cli.test_commands:batches returns list"),
        (None, ("tests.cli.test_commands:undefined",), f"undefined, line {LINE}: NameError: name 'not_there'"),
        (None, ("tests.cli.test_commands:stops",), "CaptureError: tests.cli.test_commands:stops, line "),
        (None, ("tests.cli.test_commands:bare",), "returns Tensor beside the model; example inputs are a tuple"),
        (None, ("model.pt2", "--data", "tests.cli.test_commands:failing"), "commands:failing, line "),
        (None, ("model.pt2", "--data", "."), "CalibrationError: .: images become one input [N, C, H, W]"),
        (None, ("tests.cli.test_commands:training",), "training mode: call model.eval()"),
        (None, ("model.pt2",), "CalibrationError: a static mode needs calibration data"),
        (None, ("model.pt2", "--data", "nothing.npz"), "read nothing.npz: No such file or directory. Check the name."),
        (None, ("model.pt2", "--data", "data.csv"), "CalibrationError: data.csv: data is an .npz or .safetensors file"),
        (_cut_npz, ("model.pt2", "--data", "bad.npz"), "CalibrationError: bad.npz: this file is damaged"),
        (_npz(x=X[:, :9]), ("model.pt2", "--data", "bad.npz"), "x is float32[4, 9], the model takes float32[4, 10]"),
        (_npz(x=X.astype(float)), ("model.pt2", "--data", "bad.npz"), "x is float64[4, 10], the model takes float32"),
        (_npz(x=X, y=X), ("model.pt2", "--data", "bad.npz"), "bad.npz has x, y; the model takes x. Name the arrays"),
        (_npz(x=X, y=X), ("pair.pt2", "--data", "bad.npz"), "bad.npz has x, y; the model takes x, ids"),
        (_npz(x=X[:2], ids=np.zeros(4, np.int64)), ("pair.pt2", "--data", "bad.npz"), "1 of x, 2 of ids"),
        (_recipe("target: onnx\n\nobserver: mnmax"), ("model.pt2", "--recipe", "r.yaml"), "r.yaml:3: unknown observer"),
        (None, ("model.pt2", "--recipe", "nothing.yaml"), "RecipeError: nothing.yaml: cannot read"),
        (None, ("model.pt2", "--target", "onyx"), "RecipeError: unknown target 'onyx'. Did you mean 'onnx'"),
        (None, ("model.pt2", "--mode", "qat"), "RecipeError: mode 'qat' needs a training loop"),
        (None, ("model.pt2", "--set", "x"), "RecipeError: --set takes name=value, got 'x'"),
        (None, (*QUANTIZE[1:], "--ignore", "dwon"), "TargetingError: "),
    ],
)  # fmt: skip
def test_what_goes_wrong_ends_with_one_line_and_2_and_writes_nothing(before, arguments, message, run, tmp_path, caplog):
    if before is not None:
        before(tmp_path)
    code, out, told = run("quantize", *arguments)
    assert (code, out) == (2, "")
    assert message in told
    assert told.count("\n") == 1
    assert caplog.records == []  # what loggers say reaches a terminal, too
    assert not (tmp_path / "quantized").exists()


def test_a_full_disk_ends_with_one_line_and_leaves_nothing(run, tmp_path, monkeypatch, request):
    save = Quantized.save

    def fills(self, folder):
        """The disk is full from here on; compilers too write files of their own before."""
        request.getfixturevalue("small_disk")
        return save(self, folder)

    monkeypatch.setattr(Quantized, "save", fills)
    code, _, told = run("quantize", "tests.cli.test_commands:large", *QUANTIZE[2:], "--out", "new/folder")
    assert code == 2
    assert told.startswith("FileError: cannot write")
    assert not (tmp_path / "new").exists()


def test_a_target_without_a_lowering_gets_its_graph_written(run, tmp_path):
    code, _, told = run("quantize", "model.pt2", "--target", "arm_inductor", "--data", "inputs.npz")
    assert (code, told) == (0, "")
    saved = torch.export.load(tmp_path / "quantized" / "model.pt2").module()
    assert saved(torch.zeros(4, 10)).shape == (4, 6)
    assert run("verify", "quantized")[0] == 0


def test_a_folder_that_cannot_be_made_is_named(run):
    code, _, told = run(*QUANTIZE, "--out", "model.pt2/inside")
    assert code == 2
    assert told.startswith("FileError: cannot make the folder model.pt2/inside: Not a directory.")


@pytest.mark.slow
def test_an_interrupt_leaves_nothing_behind(run, tmp_path, monkeypatch):
    def interrupted(self, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr("pt2e_quant.recipes.result.write_files", interrupted)
    code, _, _ = run(*QUANTIZE)
    assert code == 130
    assert not (tmp_path / "quantized").exists()


@pytest.mark.parametrize("command", [("list",), QUANTIZE])
def test_an_interrupt_ends_with_130(command, run, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("pt2e_quant.cli.commands.find_targets", interrupted)
    monkeypatch.setattr("pt2e_quant.cli.quantizing.load_model", interrupted)
    code, out, told = run(*command)
    assert (code, out, told) == (130, "", "")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_a_package_for_x86_is_written_and_made_again(mode, run):
    code, out, _ = run("quantize", "model.pt2", "--data", "inputs.npz", "--target", "x86", "--mode", mode)
    assert code == 0
    assert "verified on 1 batch" in out
    code, out, _ = run("verify", "quantized")
    assert code == 0
    assert "made again: the same converted graph" in out
    code, out, _ = run("bench", "model.pt2", "quantized/model.pt2", "--data", "inputs.npz", "--runs", "1", "--json")
    assert code == 0
    assert json.loads(out)[1]["sqnr"] > 25


def test_safetensors_and_arrays_without_names_are_data_too(run, tmp_path):
    save_file({"x": torch.randn(3, 2, 10), "ids": torch.zeros(3, 2, dtype=torch.long)}, tmp_path / "d.safetensors")
    np.savez(tmp_path / "d.npz", np.zeros((2, 10), np.float32), np.zeros(2, np.int64))
    model = load_model("pair.pt2")
    assert [len(batch.args) for batch in load_data("d.safetensors", model)] == [2, 2, 2]
    (only,) = load_data("d.npz", model)
    assert [one.dtype for one in only.args] == [torch.float32, torch.int64]


class Nested(nn.Module):
    """Takes a dictionary, a number and a keyword."""

    def forward(self, batch, power, *, shift):
        return (batch["a"] - batch["b"]) ** power + shift


def test_arrays_find_their_place_in_nested_inputs(tmp_path):
    a, b, shift = torch.randn(3, 2, 2).unbind()
    inputs, keywords = ({"a": a, "b": b}, 2), {"shift": shift}
    exported = torch.export.export(Nested(), inputs, keywords)
    save_file({"batch_a": a, "batch_b": b, "shift": shift}, tmp_path / "d.safetensors")
    ((args, kwargs),) = load_data(str(tmp_path / "d.safetensors"), exported)
    assert torch.equal(exported.module()(*args, **kwargs), Nested()(*inputs, **keywords))
