"""Reading specs by their fields, whatever package their class comes from, and putting them into words."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any, Literal

from torch.fx import Node

from ..errors import AnnotationError
from ..specs import EdgeOrNode, integer_range, is_per_channel, is_symmetric
from ..where import node_id

__all__ = ["SpecKind", "constructor_name", "describe_site", "describe_spec", "same_observer", "spec_key", "spec_kind"]

SpecKind = Literal["shared", "derived", "fixed", "observed"]


def spec_kind(spec: Any) -> SpecKind:
    """Which of the four kinds of spec this is, told by the fields that it has.

    Raises:
        AnnotationError: it has the fields of none.
    """
    if hasattr(spec, "edge_or_node"):
        return "shared"
    if hasattr(spec, "derive_qparams_fn"):
        return "derived"
    if hasattr(spec, "observer_or_fake_quant_ctr"):
        return "observed"
    if hasattr(spec, "scale") and hasattr(spec, "zero_point"):
        return "fixed"
    raise AnnotationError(
        f"{spec!r} is not a quantization spec: it has neither observer_or_fake_quant_ctr, scale and zero_point, "
        "edge_or_node, nor derive_qparams_fn"
    )


def spec_key(spec: Any) -> Hashable:
    """Two specs with equal keys ask for the same integers, so that two uses of one tensor may share an observer.

    How the range of a tensor is found (class and arguments of a static observer) does not count: quantizing a tensor
    to the same integers twice, with two guesses at its range, would only lose accuracy.
    """
    common = tuple(
        getattr(spec, name, None) for name in ("dtype", "quant_min", "quant_max", "qscheme", "ch_axis", "is_dynamic")
    )
    kind = spec_kind(spec)
    if kind == "fixed":
        return kind, common, float(spec.scale), int(spec.zero_point)
    if kind == "derived":
        return kind, common, tuple(spec.derived_from), spec.derive_qparams_fn
    constructor = spec.observer_or_fake_quant_ctr
    return kind, common, _constructor_key(constructor) if _says_more_than_a_range(spec, constructor) else None


def _says_more_than_a_range(spec: Any, constructor: Any) -> bool:
    """True where dtype, bounds, qscheme and axis do not say all: qparams at run time, blocks, own q/dq."""
    dynamic = bool(getattr(spec, "is_dynamic", False))
    made = _class_of(constructor)
    return dynamic or hasattr(made, "convert") or hasattr(made, "group_size") or _scheme_of(constructor) is not None


def _constructor_key(constructor: Any) -> Hashable:
    """Class and keyword arguments inside Class.with_args(...) or functools.partial, nested ones included."""
    constructor = getattr(constructor, "p", constructor)
    if not isinstance(constructor, functools.partial):
        return constructor if isinstance(constructor, Hashable) else id(constructor)
    keywords = tuple((name, _argument_key(value)) for name, value in sorted(constructor.keywords.items()))
    return _constructor_key(constructor.func), tuple(map(_argument_key, constructor.args)), keywords


def _argument_key(value: Any) -> Hashable:
    if hasattr(value, "p") or isinstance(value, functools.partial):
        return _constructor_key(value)
    return value if isinstance(value, (int, float, str, type, bool, type(None))) else repr(value)


def same_observer(one: Any, other: Any) -> bool:
    """Both specs make observers of one class from the same arguments; True as well when `other` makes none."""
    if one is other or spec_kind(other) != "observed":
        return True
    return _constructor_key(one.observer_or_fake_quant_ctr) == _constructor_key(other.observer_or_fake_quant_ctr)


def constructor_name(constructor: Any) -> str:
    """'HistogramObserver' for the class, for Class.with_args(...) and for a partial of it."""
    constructor = _class_of(constructor)
    return getattr(constructor, "__name__", type(constructor).__name__)


def _class_of(constructor: Any) -> Any:
    """What is called in the end, inside Class.with_args(...) and functools.partial."""
    constructor = getattr(constructor, "p", constructor)
    while isinstance(constructor, functools.partial):
        constructor = getattr(constructor.func, "p", constructor.func)
    return constructor


def _scheme_of(constructor: Any) -> Any:
    """The scheme in Class.with_args(scheme=...), None without one."""
    constructor = getattr(constructor, "p", constructor)
    while isinstance(constructor, functools.partial):
        if "scheme" in constructor.keywords:
            return constructor.keywords["scheme"]
        constructor = getattr(constructor.func, "p", constructor.func)
    return None


def describe_site(site: EdgeOrNode) -> str:
    """'conv2d' for a node's output, 'x -> conv2d' for one use of x."""
    return node_id(site) if isinstance(site, Node) else f"{node_id(site[0])} -> {site[1].name}"


def describe_spec(spec: Any) -> str:
    """One line, for example 'int8 [-127, 127] per channel of dim 0, symmetric, PerChannelMinMaxObserver'."""
    kind = spec_kind(spec)
    if kind == "shared":
        return f"shared with {describe_site(spec.edge_or_node)}"
    scheme = _scheme_of(getattr(spec, "observer_or_fake_quant_ctr", None))
    if scheme is not None:
        return f"{scheme}, {constructor_name(spec.observer_or_fake_quant_ctr)}"
    words = [str(spec.dtype).removeprefix("torch.") + _range(spec)]
    if integer_range(spec.dtype) is not None:
        qscheme = getattr(spec, "qscheme", None)
        if getattr(spec, "is_dynamic", False):
            words[0] += " dynamic"
        words[0] += f" per channel of dim {spec.ch_axis}" if is_per_channel(qscheme) else " per tensor"
        if is_symmetric(qscheme):
            words.append("symmetric")
    if kind == "fixed":
        words.append(f"fixed scale {spec.scale:.6g}, zero point {spec.zero_point}")
    elif kind == "derived":
        words.append(f"derived from {', '.join(map(describe_site, spec.derived_from))}")
    else:
        words.append(constructor_name(spec.observer_or_fake_quant_ctr))
    return ", ".join(words)


def _range(spec: Any) -> str:
    whole = integer_range(spec.dtype)
    if whole is None:
        return ""
    low = whole[0] if spec.quant_min is None else spec.quant_min
    high = whole[1] if spec.quant_max is None else spec.quant_max
    return f" [{low}, {high}]"
