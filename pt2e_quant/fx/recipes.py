"""A qconfig read as specs, and whether a backend computes with them.

A qconfig holds what makes observers; their class says type and bounds only once one is made. So one is made here, and
looked at.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..backend_config import BackendPatternConfig, DTypeConfig, DTypeWithConstraints
from ..errors import SpecError
from ..observer.placeholder import ReuseInputObserver
from ..specs import QuantizationSpec, integer_range, is_per_channel

__all__ = ["Recipe", "fitting", "read_recipe"]


@dataclass(frozen=True)
class Recipe:
    """What one half of a qconfig asks for.

    dtype: torch.float32 for a tensor that stays one
    spec:  None for that
    bounds: smallest and largest q
    eps: the smallest scale
    grid: (scale, zero point) that is known beforehand
    reuses: the grid is that of the input
    """

    dtype: torch.dtype
    spec: QuantizationSpec | None = None
    is_dynamic: bool = False
    bounds: tuple[int, int] | None = None
    eps: float | None = None
    grid: tuple[float, int] | None = None
    reuses: bool = False

    def __str__(self) -> str:
        return f"{'dynamic ' if self.is_dynamic else ''}{_word(self.dtype)}"


class _AsGiven:
    """A recipe of a qconfig as the constructor of a spec: it has its arguments already.

    p: the reference's name for what is inside, by which observers of equal recipes are known as equal
    """

    def __init__(self, make: Any) -> None:
        self.make = make
        self.p = functools.partial(make)

    def __call__(self, **fields: object) -> Any:
        return self.make()


def read_recipe(make: Any) -> Recipe:
    """What an observer, fake quantizer or torch.nn.Identity of a qconfig asks for.

    Raises:
        SpecError: it does not make a module.
    """
    made = make()
    if not isinstance(made, nn.Module):
        raise SpecError(f"a qconfig holds {make!r}, which makes a {type(made).__name__}; an observer is a module")
    dtype = getattr(made, "dtype", torch.float32)
    inner = getattr(made, "activation_post_process", made)
    if isinstance(made, nn.Identity) or dtype is torch.float32:
        return Recipe(torch.float32)
    if isinstance(made, ReuseInputObserver):
        return Recipe(dtype, reuses=True)
    low, high = getattr(made, "quant_min", None), getattr(made, "quant_max", None)
    dynamic = bool(getattr(made, "is_dynamic", False) or getattr(inner, "is_dynamic", False))
    whole = integer_range(dtype)
    bounds = None if whole is None else (whole[0] if low is None else int(low), whole[1] if high is None else int(high))
    scheme = getattr(made, "qscheme", None) or getattr(inner, "qscheme", None)
    axis = getattr(made, "ch_axis", getattr(inner, "ch_axis", None)) if is_per_channel(scheme) else None
    low, high = bounds or (None, None)
    spec = QuantizationSpec(dtype, _AsGiven(make), low, high, None if whole is None else scheme, axis, dynamic)
    return Recipe(dtype, spec, dynamic, bounds, _number(getattr(inner, "eps", None)), _grid(inner))


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _grid(observer: Any) -> tuple[float, int] | None:
    if "FixedQParams" not in type(observer).__name__:
        return None
    return float(observer.scale), int(observer.zero_point)


def fitting(config: BackendPatternConfig, activation: Recipe, weight: Recipe | None) -> DTypeConfig | str:
    """The combination of types of a pattern that a qconfig asks for; why there is none.

    Args:
        weight: None where the pattern has no weight that is rounded.
    """
    reasons = [_misfit(types, activation, weight) for types in config.dtype_configs]
    found = next((types for types, why in zip(config.dtype_configs, reasons, strict=True) if why is None), None)
    if found is not None:
        return found
    asked = f"{activation} activations" + ("" if weight is None else f", {weight} weights")
    known = "; ".join(dict.fromkeys(filter(None, reasons))) or "it names no types"
    return f"its qconfig asks for {asked}; the backend's pattern does not fit: {known}"


def _misfit(types: DTypeConfig, activation: Recipe, weight: Recipe | None) -> str | None:
    if bool(types.is_dynamic) is not activation.is_dynamic:
        return f"{'dynamic' if types.is_dynamic else 'static'} {_words([types.input_dtype, types.weight_dtype])}"
    output = DTypeWithConstraints() if types.is_dynamic else types.output_dtype_with_constraints
    wanted = ((types.input_dtype_with_constraints, activation), (output, activation))
    if weight is not None:
        wanted = (*wanted, (types.weight_dtype_with_constraints, weight))  # type: ignore[assignment]
    return next(filter(None, (_lack(one, recipe) for one, recipe in wanted)), None)


def _lack(one: DTypeWithConstraints, recipe: Recipe) -> str | None:
    if one.dtype is not None and one.dtype is not recipe.dtype:
        return f"{_word(one.dtype)}, not {_word(recipe.dtype)}"
    if one.scale_exact_match is not None and recipe.grid != (one.scale_exact_match, one.zero_point_exact_match):
        return (
            f"its grid is scale {one.scale_exact_match:g}, zero point {one.zero_point_exact_match}, by an observer "
            "with fixed qparams"
        )
    low, high = recipe.bounds or (None, None)
    if one.quant_min_lower_bound is not None and low is not None and low < one.quant_min_lower_bound:
        return f"q from {one.quant_min_lower_bound}, not from {low}"
    if one.quant_max_upper_bound is not None and high is not None and high > one.quant_max_upper_bound:
        return f"q to {one.quant_max_upper_bound}, not to {high}"
    if one.scale_min_lower_bound is not None and (recipe.eps or 0.0) < one.scale_min_lower_bound:
        return f"scales from {one.scale_min_lower_bound:g}, not from {recipe.eps}"
    return None


def _words(dtypes: Iterable[torch.dtype | None]) -> str:
    return " and ".join(_word(one) for one in dtypes if one is not None) or "types"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
