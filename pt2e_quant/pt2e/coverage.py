"""What a user demands to be quantized: prepare_pt2e(..., require=("linear", "encoder.*")) raises with the misses."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from ..errors import CoverageError, TargetingError, did_you_mean
from ..ops import CONV, CONV_TRANSPOSE, CONVOLUTION, EMBEDDING, LINEAR, MATMUL
from .record import Decision

__all__ = ["check_required"]

_FAMILIES = {
    "linear": frozenset(map(str, LINEAR)),
    "conv": frozenset(map(str, (*CONV, *CONV_TRANSPOSE, *CONVOLUTION))),
    "matmul": frozenset(map(str, MATMUL)),
    "embedding": frozenset(map(str, EMBEDDING)),
}
_WITH_WEIGHTS = frozenset().union(*_FAMILIES.values())
_SHOWN = 20


def check_required(decisions: list[Decision], require: Iterable[str]) -> None:
    """Raise unless every op that `require` names is quantized.

    Args:
        decisions: the fate of each op of the graph, nested graphs included.
        require: families of ops ('linear', 'conv', 'matmul', 'embedding'), or names and globs of graph nodes and
            modules. Of a module, its ops of these families must be quantized; all its ops when it has none of them.

    Raises:
        TargetingError: an entry names nothing in the graph.
        CoverageError: an op that is named stays in float; lists each with the reason.
    """
    wanted: dict[str, Decision] = {}
    for entry in [require] if isinstance(require, str) else require:
        wanted.update((decision.node, decision) for decision in _named(entry, decisions))
    misses = [decision for decision in wanted.values() if not decision.quantized]
    if not misses:
        return
    lines = [f"{len(misses)} of the {len(wanted)} ops that must be quantized stay in float:"]
    for miss in misses[:_SHOWN]:
        place = ", ".join(filter(None, (miss.module and f"in module {miss.module!r}", miss.source)))
        lines.append(f"  {miss.node} = {miss.op}: {miss.reason}" + (f"   [{place}]" if place else ""))
    if len(misses) > _SHOWN:
        lines.append(f"  ... and {len(misses) - _SHOWN} more")
    lines.append("  Change the quantizer's selectors or rules, or require less.")
    raise CoverageError("\n".join(lines))


def _named(entry: str, decisions: list[Decision]) -> list[Decision]:
    if entry in _FAMILIES:
        found = [decision for decision in decisions if decision.op in _FAMILIES[entry]]
    else:
        found = [decision for decision in decisions if fnmatch.fnmatchcase(decision.node, entry)]
        inside = [decision for decision in decisions if decision.module is not None and _inside(decision.module, entry)]
        found += [decision for decision in inside if decision.op in _WITH_WEIGHTS] or inside
    if not found:
        known = {d.node for d in decisions} | {d.module for d in decisions if d.module}
        raise TargetingError(
            f"require names {entry!r}, but the graph has no such op or module.{did_you_mean(entry, known)} "
            f"Families are {', '.join(_FAMILIES)}."
        )
    return found


def _inside(module: str, entry: str) -> bool:
    """True for the module that `entry` names or matches, and for every module inside it."""
    parts = module.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:end]), entry) for end in range(1, len(parts) + 1))
