"""Recipes in files: what is wrong is said with file and line."""

from __future__ import annotations

import pytest

from pt2e_quant.errors import RecipeError
from pt2e_quant.recipes import Recipe, find_targets, read_recipe
from pt2e_quant.recipes.images import Images
from quantizers.cache import CacheQuantizer

RECIPE = Recipe(
    target="xnnpack", options={"act_qmin": -100}, observer="minmax", ignored=("head.*", "stem"), sqnr=30.0, seed=3
)
MIXED = Recipe(target="xnnpack", precisions={"linear": "int4", "linear_1": "float"})
PICTURES = Recipe(target="xnnpack", images=Images(resize=256, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)))


def read(tmp_path, text: str, **overrides) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return read_recipe(path, overrides)


def test_a_recipe_reads_back_as_it_was(tmp_path):
    assert read(tmp_path, RECIPE.to_yaml()) == RECIPE
    assert read(tmp_path, MIXED.to_yaml()) == MIXED
    assert read(tmp_path, PICTURES.to_yaml()) == PICTURES


def test_a_file_says_its_version_and_nothing_that_is_standard():
    assert Recipe(target="onnx", mode="dynamic").to_yaml() == 'version: 1\ntarget: "onnx"\nmode: "dynamic"\n'


def test_a_file_may_say_it_as_people_write_it(tmp_path):
    text = "target: xnnpack  # for phones\noptions:\n  act_qmin: -100\nignored: [head.*, stem]\nobserver: minmax\n"
    assert read(tmp_path, text, sqnr=30.0, seed=3) == RECIPE


def test_options_are_merged_with_overrides(tmp_path):
    found = read(tmp_path, "target: xnnpack\noptions: {act_qmin: -100}", options={"act_qmax": 100}, mode="dynamic")
    assert (found.mode, found.options) == ("dynamic", {"act_qmin": -100, "act_qmax": 100})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "version: 1\ntarget: xnnpack\n\nobserver: mnmax\n",
            "recipe.yaml:4: unknown observer 'mnmax'. Did you mean",
        ),
        ("target: xnpack\n", "recipe.yaml:1: unknown target 'xnpack'. Did you mean 'xnnpack'"),
        ("target: onnx\nmode: qat", "recipe.yaml:2: mode 'qat' needs a training loop"),
        ("target: onnx\nmode: static\nmode: dynamic", "recipe.yaml:3: 'mode' stands in line 2 already"),
        (
            "target: onnx\noptions:\n  reduce_rnge: true",
            "recipe.yaml:3: unknown option 'reduce_rnge'. Did you mean",
        ),
        ("target: xnnpack\nprecisions:\n  a: int4\n  b: int5", "recipe.yaml:4: 'b' is to be in unknown format 'int5'."),
        ("tarjet: x", "recipe.yaml:1: unknown field 'tarjet'. Did you mean 'target'"),
        ("target: [", "recipe.yaml:1: this is no YAML"),
        ("a: b: c", "recipe.yaml:1: this is no YAML"),
        ("- 1", "recipe.yaml:1: a recipe is lines of 'field: value'"),
        ("", "recipe.yaml:1: a recipe is lines of 'field: value'"),
        ("target: onnx\nignored: 3", "recipe.yaml:2: ignored: it is 3, not a list"),
        ("target: onnx\nsqnr: high\n", "recipe.yaml:2: sqnr: it is 'high', not float"),
        ("target: onnx\nseed: true", "recipe.yaml:2: seed: it is True, not int"),
        ("mode: static", "recipe.yaml: a recipe says what for"),
        ("target: onnx\nversion: 2", "recipe.yaml:2: this recipe has version 2"),
        ("target: onnx\nimages: {men: [0]}", "recipe.yaml:2: images: Images does not have 'men'"),
        ("target: onnx\nimages: {std: [0]}", "recipe.yaml:2: images: Images: mean and std need a number each"),
        ("target: cache\nmode: dynamic", "recipe.yaml:2: target 'cache' has no mode 'dynamic'"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_line(text, message, tmp_path):
    with pytest.raises(RecipeError) as raised:
        read(tmp_path, text)
    assert message in str(raised.value)


def test_a_quantizer_that_names_no_modes_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(CacheQuantizer, "modes", {})
    with pytest.raises(RecipeError, match=r"recipe\.yaml:1: the quantizer of target 'cache' has no modes"):
        read(tmp_path, "target: cache")


def test_an_override_that_is_wrong_is_no_fault_of_a_line(tmp_path):
    with pytest.raises(RecipeError, match=r"recipe\.yaml: target .* has no mode 'static_'"):
        read(tmp_path, "target: onnx\nmode: static", mode="static_")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"nothing\.yaml: cannot read"):
        read_recipe(tmp_path / "nothing.yaml")


def test_targets_have_short_names():
    assert find_targets()["x86"] == "quantizers.x86_inductor:X86InductorQuantizer"
    assert "x86_inductor" not in find_targets()
