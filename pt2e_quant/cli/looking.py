"""`pt2e-quant compare` and `pt2e-quant sensitivity`: which tensor errs most, and which layer costs the outputs most."""

from __future__ import annotations

from typing import Any

from torch.export import ExportedProgram
from torch.fx import GraphModule

from ..debug import compare, sensitivity
from ..errors import CalibrationError
from ..plain import to_plain
from ..recipes import Recipe, convert_by
from .output import tell
from .sources import load_data, load_model

__all__ = ["compare_model", "rank_layers"]


def compare_model(model: str, data: str | None, recipe: Recipe, as_json: bool) -> None:
    """Print the comparison of a model with what a recipe makes of it."""
    exact, converted, batches = _made(model, data, recipe)
    found = compare(exact, converted, batches)
    tell(found.to_dict(), str(found), as_json)


def rank_layers(model: str, data: str | None, recipe: Recipe, as_json: bool) -> None:
    """Print the layers that a recipe quantizes, those that cost most first."""
    found = sensitivity(*_made(model, data, recipe))
    tell(to_plain(found), found.text(), as_json)


def _made(model: str, data: str | None, recipe: Recipe) -> tuple[ExportedProgram, GraphModule, list[Any]]:
    exact = load_model(model)
    if data is None:
        raise CalibrationError("errors are measured on data: --data inputs.npz")
    batches = load_data(data, exact, recipe.images)
    return exact, convert_by(recipe, exact, batches), batches
