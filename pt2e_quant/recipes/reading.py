"""Recipes in files: YAML with exact places. 'recipe.yaml:12: unknown observer 'mnmax'. Did you mean 'minmax'?'"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from ..checks import checked
from ..errors import FileError, RecipeError, did_you_mean
from ..files import open_file
from ..plain import PlainError, from_plain
from .recipe import Recipe, problems_of

__all__ = ["parse_recipe", "read_recipe"]

_KEYS = tuple(one.name for one in fields(Recipe))


@checked(RecipeError)
def read_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe in a YAML file.

    Args:
        path: the file.
        overrides: values that replace those of the file, by field; options are merged.

    Raises:
        RecipeError: the file cannot be read, is no YAML, or says what no recipe can say; with file and line.
    """
    try:
        with open_file(path) as file:
            text = file.read().decode()
    except (FileError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: {error}") from error
    return parse_recipe(text, str(path), overrides or {})


def parse_recipe(text: str, name: str, overrides: Mapping[str, Any]) -> Recipe:
    """The same of a text; `name` stands in front of every message."""
    written = _written(text, name)
    values = {key: one.value for key, one in written.items() if "." not in key}
    options = {**values.get("options", {}), **overrides.get("options", {})}
    values |= {**overrides, **({"options": options} if options else {})}

    def line(field: str) -> str:
        found = written.get(field) or written.get(field.partition(".")[0])
        return f"{name}:{found.line}" if found is not None and field not in overrides else name

    kinds = get_type_hints(Recipe)
    for key, value in values.items():
        try:
            values[key] = from_plain(kinds[key], value)
        except (PlainError, RecipeError) as error:
            raise RecipeError(f"{line(key)}: {key}: {error}") from error
    if "target" not in values:
        raise RecipeError(f"{name}: a recipe says what for: target: xnnpack")
    problem = next(problems_of(values), None)
    if problem is not None:
        raise RecipeError(f"{line(problem[0])}: {problem[1]}")
    return Recipe(**values)


@dataclass(frozen=True)
class _Written:
    value: Any
    line: int


def _written(text: str, name: str) -> dict[str, _Written]:
    """By 'field', 'options.name' and 'precisions.name': what the file says, and where.

    Raises:
        RecipeError: it is no YAML, no mapping, or has a key twice or one that recipes have not.
    """
    try:
        import yaml
    except ImportError as error:
        raise RecipeError('recipes in files need PyYAML: pip install "pt2e-quant[cli]"') from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        held = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark is not None else name
        raise RecipeError(f"{where}: this is no YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(held, dict):
        raise RecipeError(f"{name}:1: a recipe is lines of 'field: value', such as target: xnnpack")
    found: dict[str, _Written] = {}
    _walk(root, held, "", name, found)
    return found


def _walk(node: Any, held: dict[str, Any], prefix: str, name: str, found: dict[str, _Written]) -> None:
    for key, value in node.value:
        path, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if path in found:
            raise RecipeError(f"{name}:{line}: {path!r} stands in line {found[path].line} already")
        if not prefix and path not in _KEYS:
            raise RecipeError(f"{name}:{line}: unknown field {path!r}.{did_you_mean(path, _KEYS)}")
        found[path] = _Written(held.get(key.value), line)
        if path in ("options", "precisions") and isinstance(held[path], dict):
            _walk(value, held[path], f"{path}.", name, found)
