"""Which configuration a node gets: what a user selects by node, module name, module type, operator or globally.

Precedence: node > module name > module type > operator > global. Within one kind, an exact name (type, overload) beats
one that only includes it (glob, base class, packet), a deeper module beats the one around it, and otherwise the one set
last wins. `None` means: stay in floating point. A selector that matches no node of the graph is an error that names the
nearest candidates.
"""

from __future__ import annotations

import fnmatch
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..errors import TargetingError, did_you_mean
from ..graph.nested import graphs
from ..meta import NESTED_KEY
from ..ops import resolve
from ..reasons import Folded
from ..where import module_stack, node_id, type_name
from .config import QuantizationConfig

__all__ = ["Choice", "Targets"]

_UNSET = object()


@dataclass(frozen=True)
class Choice:
    """What was chosen for one node: a config, or None for float, and the selector that said so ('' when none did)."""

    config: QuantizationConfig | None
    selector: str

    @property
    def is_set(self) -> bool:
        return bool(self.selector)

    @property
    def is_explicit(self) -> bool:
        """Something narrower than the global selector said so."""
        return self.selector not in ("", "global")


@dataclass
class Targets:
    """The selectors of one quantizer, in the order in which they were set."""

    everything: Any = _UNSET
    operators: dict[Any, QuantizationConfig | None] = field(default_factory=dict)
    module_types: dict[Any, QuantizationConfig | None] = field(default_factory=dict)
    module_names: dict[str, QuantizationConfig | None] = field(default_factory=dict)
    nodes: dict[str, QuantizationConfig | None] = field(default_factory=dict)
    filter_function: Callable[[Node], bool] | None = None

    def copy(self) -> Targets:
        """The same selectors, to which others can be added."""
        tables: dict[str, Any] = {name: dict(value) for name, value in vars(self).items() if isinstance(value, dict)}
        return replace(self, **tables)

    @property
    def is_empty(self) -> bool:
        """Nothing was selected that could be quantized."""
        selected = (self.operators, self.module_types, self.module_names, self.nodes)
        return not any(selected) and self.everything in (_UNSET, None)

    def choose(self, model: GraphModule, folded: Iterable[Folded] = ()) -> dict[Node, Choice]:
        """The choice for every call_function node of the graph itself, without those of nested graphs.

        Args:
            model: the graph.
            folded: batch norms that are no longer in it; a selector that names one is told where it went.

        Raises:
            TargetingError: a selector matches no node, neither in this graph nor in one nested in it. Of a nested
                graph nothing is demanded; the outermost one speaks for all.
        """
        by_operator = _by_overload(self.operators)
        matches = {node: self._matches(node, by_operator) for node in _calls(model)}
        if NESTED_KEY not in model.meta:
            inner = [node for path, part in graphs(model, opaque=False) if path for node in _calls(part)]
            everywhere = matches | {node: self._matches(node, by_operator) for node in inner}
            used = {choice.selector for found in everywhere.values() for choice in found}
            self._raise_on_unused(used, list(everywhere), list(folded))
        return {node: self._filtered(node, found) for node, found in matches.items()}

    def _matches(self, node: Node, by_operator: dict[Any, list[Choice]]) -> list[Choice]:
        """Every selector that matches the node, strongest first."""
        called = {node.name, node_id(node)}
        names = [pattern for pattern in reversed(self.nodes) if any(fnmatch.fnmatchcase(n, pattern) for n in called)]
        names.sort(key=lambda pattern: pattern not in called)
        found = [Choice(self.nodes[pattern], f"node {pattern!r}") for pattern in names]
        stack = module_stack(node) if self.module_names or self.module_types else []
        found += self._by_module_name([path for path, _ in stack])
        found += self._by_module_type([kind for _, kind in stack])
        found += by_operator.get(node.target, ())
        if self.everything is not _UNSET:
            found.append(Choice(self.everything, "global"))
        return found

    def _by_module_name(self, paths: list[str]) -> list[Choice]:
        found = []
        for path in reversed(paths):
            if path in self.module_names:
                found.append(Choice(self.module_names[path], f"module name {path!r}"))
        for pattern, config in reversed(self.module_names.items()):
            if pattern not in paths and any(fnmatch.fnmatchcase(path, pattern) for path in paths):
                found.append(Choice(config, f"module name {pattern!r}"))
        return found

    def _by_module_type(self, kinds: list[object]) -> list[Choice]:
        found = []
        for kind in reversed(kinds):
            fitting = [wanted for wanted in reversed(self.module_types) if _is_kind(kind, wanted)]
            fitting.sort(key=lambda wanted, kind=kind: type_name(wanted) != type_name(kind))  # type: ignore[misc]
            found += [Choice(self.module_types[wanted], f"module type {type_name(wanted)}") for wanted in fitting]
        return found

    def _filtered(self, node: Node, matches: list[Choice]) -> Choice:
        if self.filter_function is not None and not self.filter_function(node):
            return Choice(None, "the filter function")
        return matches[0] if matches else Choice(None, "")

    def _raise_on_unused(self, used: set[str], nodes: list[Node], folded: list[Folded]) -> None:
        stacks = [module_stack(node) for node in nodes]
        gone = {place: fold for fold in reversed(folded) for place in (fold.node, fold.module, fold.kind) if place}
        self._check("node", self.nodes, used, {node_id(node) for node in nodes}, gone)
        names = {path for stack in stacks for path, _ in stack}
        self._check("module name", self.module_names, used, names, gone)
        types = {type_name(kind) for stack in stacks for _, kind in stack}
        self._check("module type", map(type_name, self.module_types), used, types, gone, quoted=False)
        targets = {str(node.target) for node in nodes}
        self._check("operator", map(str, self.operators), used, targets, {}, quoted=False)

    @staticmethod
    def _check(
        what: str, wanted: Iterable[str], used: set[str], known: set[str], gone: dict[str, Folded], quoted: bool = True
    ) -> None:
        for name in wanted:
            if (f"{what} {name!r}" if quoted else f"{what} {name}") in used:
                continue
            fold = next((gone[place] for place in gone if fnmatch.fnmatchcase(place, name)), None)
            if fold is not None:
                where = f" (module {fold.into_module!r})" if fold.into_module else ""
                hint = f" The batch norm {fold.node} was folded into {fold.into}{where}; select that instead."
            elif not known:
                hint = f" This graph records no {what} at all; export the model again with torch.export.export."
            else:
                hint = did_you_mean(name, known)
            raise TargetingError(f"the selector {what} {name!r} matches nothing.{hint}")


def _calls(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if node.op == "call_function"]


def _by_overload(operators: dict[Any, QuantizationConfig | None]) -> dict[Any, list[Choice]]:
    """Selectors by overload, strongest first: the overload itself, its twins, the packet that contains it."""
    table: dict[Any, list[Choice]] = defaultdict(list)
    for wanted in sorted(operators, key=lambda one: not isinstance(one, torch._ops.OpOverload)):
        for overload in resolve(wanted):
            place = 0 if wanted is overload else len(table[overload])
            table[overload].insert(place, Choice(operators[wanted], f"operator {wanted}"))
    return table


def _is_kind(kind: object, wanted: object) -> bool:
    """True when a recorded module type is `wanted` or a subclass of it. Export records types as qualified names."""
    if type_name(kind) == type_name(wanted):
        return True
    if isinstance(wanted, type):
        actual = kind if isinstance(kind, type) else _imported_class(str(kind))
        return isinstance(actual, type) and issubclass(actual, wanted)
    return False


def _imported_class(name: str) -> object:
    """The class of a qualified name when its module has been imported, else None."""
    parts = name.split(".")
    for split in range(len(parts) - 1, 0, -1):
        module = sys.modules.get(".".join(parts[:split]))
        if module is not None:
            value: object = module
            for part in parts[split:]:
                value = getattr(value, part, None)
            return value
    return None
