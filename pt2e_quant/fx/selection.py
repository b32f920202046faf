"""Which qconfig of a QConfigMapping each node gets, and keys of the mapping that no part of the model answers to."""

from __future__ import annotations

import functools
import operator
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from ..errors import TargetingError, did_you_mean
from ..qconfig import QConfigAny
from ..qconfig_mapping import QConfigMapping, get_default_qconfig_mapping
from ..where import module_stack, type_name
from .matching import keys_of, module_of

__all__ = ["check_keys", "select"]


def select(gm: GraphModule, mapping: QConfigMapping) -> dict[Node, QConfigAny]:
    """The qconfig of each node that calls something."""
    uses: Counter[tuple[str, Any]] = Counter()
    chosen: dict[Node, QConfigAny] = {}
    for node in gm.graph.nodes:
        if node.op in ("call_module", "call_function", "call_method"):
            path, owner, kinds = _place(gm, node)
            chosen[node] = _chosen(mapping, path, owner, kinds, uses)
            uses.update((owner, kind) for kind in kinds)
    return chosen


def _chosen(mapping: QConfigMapping, path: str, owner: str, kinds: list[Any], uses: Counter[Any]) -> QConfigAny:
    for kind in kinds:
        key = (owner, kind, uses[owner, kind])
        if key in mapping.module_name_object_type_order_qconfigs:
            return mapping.module_name_object_type_order_qconfigs[key]
    known = [kind for kind in kinds if kind in mapping.object_type_qconfigs]
    return mapping.qconfig_for(path, known[0] if known else kinds[0])


def _place(gm: GraphModule, node: Node) -> tuple[str, str, list[Any]]:
    """Path of the module, path of what counts its uses, and the types and functions that select the node."""
    stack = module_stack(node)
    if node.op == "call_module":
        path = str(node.target)
        return path, path.rpartition(".")[0], _classes(module_of(gm, node))
    path, kind = stack[-1] if stack else ("", None)
    inside = [kind] if isinstance(kind, type) else [type_name(kind)] if kind else []
    called = list(_functions(gm, node)) if isinstance(node.target, OpOverload) else [node.target]
    return path, path, [*inside, *called]


def _classes(module: nn.Module | None) -> list[Any]:
    """The classes of a module; of a fused one those of what comes first in it."""
    first = module[0] if isinstance(module, nn.Sequential) and len(module) else None
    kinds = (*type(module).__mro__[:-2], *(type(first).__mro__[:-2] if first is not None else ()))
    return [kind for kind in kinds if kind is not nn.Sequential]


def _functions(gm: GraphModule, node: Node) -> Iterable[Any]:
    """The functions of torch, and the name of the method, that an ATen operator is."""
    (key,) = keys_of(gm, node)
    name = str(key).removeprefix("aten.")
    yield from _default_keys().get(name, ())
    yield name


@functools.cache
def _default_keys() -> dict[str, list[Any]]:
    """The functions of the default mapping, by the names of their operators."""
    found: dict[str, list[Any]] = {}
    for key in get_default_qconfig_mapping().object_type_qconfigs:
        if not isinstance(key, (str, type)):
            found.setdefault(key.__name__.rstrip("_"), []).append(key)
    return found


def check_keys(mapping: QConfigMapping, gm: GraphModule, model: nn.Module) -> None:
    """Every key of a mapping selects something.

    Raises:
        TargetingError: one does not; names the nearest. The types of the default mappings may be there for nothing.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in mapping.module_name_qconfigs:
        if path not in modules:
            raise TargetingError(f"set_module_name: {_no(model, 'module', path)}{did_you_mean(path, modules)}")
    for pattern in mapping.module_name_regex_qconfigs:
        if not any(re.match(pattern, path) for path in modules):
            raise TargetingError(
                f"set_module_name_regex: {_no(model, 'module that matches', pattern)}{did_you_mean(pattern, modules)}"
            )
    places = [_place(gm, node) for node in gm.graph.nodes if node.op in ("call_module", "call_function", "call_method")]
    uses = Counter((owner, kind) for _, owner, kinds in places for kind in kinds)
    for owner, kind, index in mapping.module_name_object_type_order_qconfigs:
        if index >= uses[owner, kind]:
            raise TargetingError(
                f"set_module_name_object_type_order: {owner or 'the model'!r} uses {_word(kind)} {uses[owner, kind]} "
                f"times, so that there is no use number {index}, counted from 0"
            )
    known = {type(module) for module in modules.values()} | {kind for _, _, kinds in places for kind in kinds}
    usual = get_default_qconfig_mapping().object_type_qconfigs
    for kind in mapping.object_type_qconfigs:
        if kind not in usual and kind not in known:
            raise TargetingError(
                f"set_object_type: {_no(model, 'use of', _word(kind))}{did_you_mean(_word(kind), map(_word, known))}"
            )


def _no(model: nn.Module, what: str, name: str) -> str:
    return f"{type(model).__name__} has no {what} {name!r}."


def _word(kind: Any) -> str:
    name = str(getattr(kind, "__name__", kind))
    if isinstance(kind, (str, type)):
        return name
    return f"operator.{name}" if kind in vars(operator).values() else torch.overrides.resolve_name(kind) or name
