"""From specs to observers: one observer (or fake-quantizer) for each sharing group of a plan."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import AnnotationError, QuantizationError, SpecError
from ..fake_quantize import FixedQParamsFakeQuantize
from ..observer.derived import DerivedObserver
from ..observer.fixed import FixedQParamsObserver
from ..quantizer.reading import Constructor, SpecReading, read_constructor
from ..specs import DerivedQuantizationSpec
from ..where import describe_site
from .plan import Group, Plan

__all__ = ["make_observers"]


def make_observers(plan: Plan, *, to_train: bool = False) -> list[nn.Module]:
    """The observer of each group, in the order of `plan.groups`.

    Args:
        to_train: tensors with fixed qparams are rounded to them, where calibration leaves them as they are.

    Raises:
        SpecError: a constructor does not accept what its spec says.
        AnnotationError: a derived spec follows from a tensor that is not quantized.
    """
    observers: list[nn.Module | None] = [
        None if group.derived else _make(group.spec, to_train) for group in plan.groups
    ]
    for number, group in enumerate(plan.groups):
        if group.derived:
            observers[number] = _make_derived(group, plan, observers)
    return observers  # type: ignore[return-value]


def _make(spec: SpecReading, to_train: bool) -> nn.Module:
    fields = dict(spec.given)
    if spec.constructor is None:
        fields.pop("ch_axis", None)
        fixed = functools.partial(FixedQParamsObserver, spec.scale, spec.zero_point, **fields)  # type: ignore[arg-type]
        return FixedQParamsFakeQuantize(observer=fixed) if to_train else fixed()
    name = spec.constructor.name
    if not _accepts_axis(spec.constructor):
        fields.pop("ch_axis", None)
    try:
        observer = spec.constructor.call(**fields)
    except QuantizationError:
        raise
    except Exception as error:  # observers of other packages raise what they like
        raise SpecError(
            f"{name} cannot be made from its spec: {error}. It was called with {fields}; an observer takes the fields "
            "of QuantizationSpec as keyword arguments."
        ) from error
    if not isinstance(observer, nn.Module):
        raise SpecError(f"{name} must make an nn.Module, it made {type(observer).__name__}")
    return observer


def _accepts_axis(constructor: Constructor) -> bool:
    """True when ch_axis reaches something that takes it: the class itself, or the observer inside a fake-quantizer."""
    parameters = _parameters(constructor.made)
    if "ch_axis" in parameters:
        return True
    inner = constructor.arguments.get("observer", parameters["observer"].default if "observer" in parameters else None)
    return inner is not None and inner is not inspect.Parameter.empty and _accepts_axis(read_constructor(inner))


@functools.lru_cache(maxsize=256)
def _parameters(constructor: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(constructor).parameters


def _make_derived(group: Group, plan: Plan, observers: list[nn.Module | None]) -> nn.Module:
    sources = []
    spec = group.spec
    for site in spec.derived_from:
        number = plan.group_of.get(site)
        source = None if number is None else observers[number]
        if source is None:
            members = ", ".join(map(describe_site, group.members))
            raise AnnotationError(
                f"the qparams of {members} are derived from {describe_site(site)}, which is not quantized, or itself "
                "derived. Annotate that tensor with a spec of its own."
            )
        sources.append(source)
    ours = DerivedQuantizationSpec(list(spec.derived_from), spec.derive, **spec.given)  # type: ignore[arg-type]
    return DerivedObserver(sources, ours)
