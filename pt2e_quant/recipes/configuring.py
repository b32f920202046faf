"""A quantizer from a recipe: its configuration, its observer, and the modules and operators that stay in float."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ..debug.precisions import Precisions
from ..errors import RecipeError
from .recipe import Recipe
from .targets import load_target

__all__ = ["leaving", "observed_by", "quantizer_of"]


def quantizer_of(recipe: Recipe) -> Any:
    """The target's quantizer, configured; modules that the recipe ignores stay in float.

    Raises:
        TargetingError: the recipe has formats for single operators, and the quantizer declares none.
    """
    made = leaving(load_target(recipe.target).quantizer().set_global(recipe.configuration()), recipe.ignored, ())
    return Precisions(recipe.precisions).apply(made) if recipe.precisions else made


def leaving(quantizer: Any, modules: Iterable[str], nodes: Iterable[str]) -> Any:
    """A copy that leaves modules (paths or globs) and nodes in float.

    Raises:
        RecipeError: the quantizer has no selectors.
    """
    quantizer, modules, nodes = copy.deepcopy(quantizer), tuple(modules), tuple(nodes)
    if (modules or nodes) and not hasattr(quantizer, "set_module_name"):
        raise RecipeError(f"{type(quantizer).__name__} has no selectors, so nothing can be left in float by name")
    for name in modules:
        quantizer.set_module_name(name, None)
    for name in nodes:
        quantizer.set_node_name(name, None)
    return quantizer


def observed_by(config: Any, observer: Any) -> Any:
    """A configuration with another observer of activations."""
    fields = ("input_activation", "output_activation")
    return replace(
        config,
        **{
            name: replace(spec, observer_or_fake_quant_ctr=observer)
            for name in fields
            if (spec := getattr(config, name)) is not None
        },
    )
