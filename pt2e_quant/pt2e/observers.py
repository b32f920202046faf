"""From specs to observers: one observer (or fake-quantizer) for each sharing group of a plan."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AnnotationError, QuantizationError, SpecError
from ..observer.derived import DerivedObserver
from ..observer.fixed import FixedQParamsObserver
from .plan import Group, Plan
from .spec_fields import constructor_name, describe_site, spec_kind

__all__ = ["has_data", "make_observers"]

_SPEC_FIELDS = ("dtype", "quant_min", "quant_max", "qscheme", "ch_axis", "is_dynamic")


def make_observers(plan: Plan) -> list[nn.Module]:
    """The observer of each group, in the order of `plan.groups`.

    Raises:
        SpecError: a constructor does not accept what its spec says.
        AnnotationError: a derived spec follows from a tensor that is not quantized.
    """
    observers: list[nn.Module | None] = [None if group.derived else _make(group.spec) for group in plan.groups]
    for number, group in enumerate(plan.groups):
        if group.derived:
            observers[number] = _make_derived(group, plan, observers)
    return observers  # type: ignore[return-value]


def _make(spec: Any) -> nn.Module:
    fields = {name: value for name in _SPEC_FIELDS if (value := getattr(spec, name, None)) is not None}
    if spec_kind(spec) == "fixed":
        fields.pop("ch_axis", None)
        return FixedQParamsObserver(scale=spec.scale, zero_point=spec.zero_point, **fields)
    constructor = spec.observer_or_fake_quant_ctr
    if not _accepts_axis(constructor):
        fields.pop("ch_axis", None)
    try:
        observer = constructor(**fields)
    except QuantizationError:
        raise
    except Exception as error:  # observers of other packages raise what they like
        raise SpecError(
            f"{constructor_name(constructor)} cannot be made from its spec: {error}. It was called with {fields}; "
            "an observer takes the fields of QuantizationSpec as keyword arguments."
        ) from error
    if not isinstance(observer, nn.Module):
        raise SpecError(f"{constructor_name(constructor)} must make an nn.Module, it made {type(observer).__name__}")
    return observer


def _accepts_axis(constructor: Any) -> bool:
    """True when ch_axis reaches something that takes it: the class itself, or the observer inside a fake-quantizer."""
    constructor = getattr(constructor, "p", constructor)
    inner = None
    while isinstance(constructor, functools.partial):
        inner = inner or constructor.keywords.get("observer")
        constructor = getattr(constructor.func, "p", constructor.func)
    parameters = _parameters(constructor)
    if "ch_axis" in parameters:
        return True
    inner = inner or (parameters["observer"].default if "observer" in parameters else None)
    return inner is not None and inner is not inspect.Parameter.empty and _accepts_axis(inner)


@functools.lru_cache(maxsize=256)
def _parameters(constructor: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(constructor).parameters


def _make_derived(group: Group, plan: Plan, observers: list[nn.Module | None]) -> nn.Module:
    sources = []
    for site in group.spec.derived_from:
        number = plan.group_of.get(site)
        source = None if number is None else observers[number]
        if source is None:
            members = ", ".join(map(describe_site, group.members))
            raise AnnotationError(
                f"the qparams of {members} are derived from {describe_site(site)}, which is not quantized, or itself "
                "derived. Annotate that tensor with a spec of its own."
            )
        sources.append(source)
    return DerivedObserver(sources, group.spec)


def has_data(module: nn.Module) -> bool:
    """False for a calibrated observer that has not seen a value yet, of this package or of another."""
    if getattr(module, "block_size", ()) is None and hasattr(module, "convert"):
        return False  # those that write their own q/dq need the shape of a block, dynamic ones too
    if getattr(module, "is_dynamic", False) or not _is_integer(getattr(module, "dtype", None)):
        return True
    if isinstance(module, DerivedObserver):
        return all(map(has_data, module.sources))
    known = getattr(module, "has_data", None)
    if isinstance(known, bool):
        return known
    module = getattr(module, "activation_post_process", module)
    low = getattr(module, "min_val", None)
    if not isinstance(low, Tensor):
        return True
    return low.numel() > 0 and not math.isinf(float(low.flatten()[0]))


def _is_integer(dtype: Any) -> bool:
    return isinstance(dtype, torch.dtype) and not dtype.is_floating_point
