"""`pt2e-quant quantize` and `pt2e-quant verify`: from a float model to a folder, and whether it can be made again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import RecipeError
from ..files import make_folder
from ..recipes import Quantized, Recipe, check_saved, quantize_and_lower, read_recipe
from ..recipes.manifest import Manifest, packages
from .output import tell
from .sources import load_data, load_model

__all__ = ["quantize_model", "recipe_of", "verify_folder"]


def quantize_model(model: str, data: str | None, out: Path, recipe: Recipe, as_json: bool) -> None:
    """Carry out a recipe and save everything in a folder, which is made when it is not there."""
    quantized = _quantized(model, data, recipe)
    with _folder(out):
        paths = quantized.save(out)
    plain = {
        "artefact": str(paths[0]),
        "bytes": paths[0].stat().st_size,
        "quantized": len(quantized.report.quantized),
        "in_float": len(quantized.report.skipped),
        "left_for_budget": list(quantized.left),
        "accuracy": quantized.accuracy,
        "formats": {} if quantized.search is None else dict(quantized.search.precisions.formats),
        "files": [str(path) for path in paths],
    }
    tell(plain, f"{quantized}\nwritten: {', '.join(map(str, paths))}", as_json)


@contextmanager
def _folder(out: Path) -> Iterator[None]:
    """A folder, with those above it; those that were not there are gone again when what is written into it fails."""
    missing = [path for path in (out, *out.parents) if not path.exists()]
    try:
        make_folder(out)
        yield
    except BaseException:
        for path in filter(Path.exists, missing):
            path.rmdir()
        raise


def recipe_of(path: Path | None, overrides: dict[str, Any], settings: list[str]) -> Recipe:
    """From a file or from options alone.

    Args:
        path: of a YAML file; None for none.
        overrides: fields that were given; None for those that were not.
        settings: 'name=value', options of the configuration; values are JSON, or text.
    """
    given = {name: value for name, value in overrides.items() if value not in (None, ())}
    if settings:
        given["options"] = dict(map(_setting, settings))
    if path is not None:
        return read_recipe(path, given)
    return Recipe(**{"target": "xnnpack", **given})


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"--set takes name=value, got {text!r}")
    try:
        return name, json.loads(value.lower() if value in ("True", "False") else value)
    except ValueError:
        return name, value


def _quantized(model: str, data: str | None, recipe: Recipe) -> Quantized:
    exported = load_model(model)
    torch.manual_seed(recipe.seed)
    batches = None if data is None else load_data(data, exported, recipe.images)
    quantized = quantize_and_lower(exported, data=batches, recipe=recipe)
    sources = {"model": model} | ({"data": data} if data is not None else {})
    return replace(quantized, manifest=replace(quantized.manifest, sources=sources))


def verify_folder(folder: Path, model: str | None, data: str | None, as_json: bool) -> None:
    """Check hashes, then make the artefact again from its sources and compare.

    Raises:
        RecipeError: a file was changed, sources are missing, or something else came out.
    """
    saved = check_saved(folder)
    sources = saved.sources | {name: value for name, value in (("model", model), ("data", data)) if value is not None}
    if "model" not in sources:
        raise RecipeError(f"{folder} was made from Python; name its sources: --model model.pt2 --data inputs.npz")
    again = _quantized(sources["model"], sources.get("data"), read_recipe(folder / "recipe.yaml"))
    fresh = again.manifest.of_files(saved.artefact, {saved.artefact: again._artefact()})
    different = saved.differences(fresh)
    if different:
        raise RecipeError(f"{folder}: {_told(different)} came out otherwise than when it was saved.{_versions(saved)}")
    same = "the same bytes" if saved.repeats else "the same converted graph (bytes of .pt2 files vary)"
    tell(
        {"artefact": saved.artefact, "same_bytes": saved.repeats},
        f"{folder}: all files are as saved; made again: {same}",
        as_json,
    )


def _told(different: dict[str, tuple[str, str]]) -> str:
    return ", ".join(f"{name} ({two[:12]}, not {one[:12]})" for name, (one, two) in different.items())


def _versions(saved: Manifest) -> str:
    now = packages()
    changed = [f"{name} {old} -> {now.get(name)}" for name, old in saved.packages.items() if now.get(name) != old]
    return f" Versions differ: {', '.join(changed)}." if changed else " All versions are those of the manifest."
