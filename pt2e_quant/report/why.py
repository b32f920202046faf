"""Answers to "why": all that a record holds about one op or one module, in a few lines."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import TargetingError, did_you_mean
from ..pt2e.record import Decision, GroupRecord, Record
from ..reasons import WAYS_OUT, Folded
from .text import ends_text, qparams_text, sharing_cost

__all__ = ["why"]

_SHOWN = 8


def why(record: Record, name: str) -> str:
    """What became of one node, or of all nodes of a module.

    Raises:
        TargetingError: there is no such node or module.
    """
    groups = {member: group for group in record.groups for member in group.members}
    found = [_decision(d, groups) for d in record.decisions if d.node == name]
    found = found or [_folded(fold) for fold in record.folded if fold.node == name]
    found = found or [
        *(_decision(d, groups) for d in record.decisions if d.module is not None and _inside(d.module, name)),
        *(_folded(fold) for fold in record.folded if fold.module is not None and _inside(fold.module, name)),
    ]
    if found:
        return "\n".join(found)
    places: list[Decision | Folded] = [*record.decisions, *record.folded]
    known = {place.node for place in places} | {place.module for place in places if place.module}
    raise TargetingError(f"no op {name!r} and no module {name!r} in this report.{did_you_mean(name, known)}")


def _inside(module: str, wanted: str) -> bool:
    return module == wanted or module.startswith(f"{wanted}.")


def _head(what: str, module: str | None, source: str | None) -> str:
    where = ", ".join(place for place in (module, source) if place)
    return what + (f"   [{where}]" if where else "")


def _folded(fold: Folded) -> str:
    head = _head(f"{fold.node} = batch norm", fold.module, fold.source)
    into = f"{fold.into} (module {fold.into_module})" if fold.into_module else fold.into
    return f"{head}\n  folded into {into}: its scale and shift are part of that layer's weight and bias; ask for that"


def _decision(decision: Decision, groups: dict[str, GroupRecord]) -> str:
    head = _head(f"{decision.node} = {decision.op}", decision.module, decision.source)
    if not decision.quantized:
        code = decision.code or ""
        way_out = f"\n  {code}: {WAYS_OUT[code]}" if code in WAYS_OUT else ""
        return f"{head}\n  float: {decision.reason}{way_out}"
    path, _, name = decision.node.rpartition(".")
    sites = [(source, spec, f"{source} -> {name}") for source, spec in decision.inputs.items()]
    if decision.output is not None:
        sites.append(("output", decision.output, name))
    lines = [head, f"  quantized by {decision.rule}"]
    lines += [f"  {other} wanted it as well, and came later" for other in decision.overlaps]
    lines += [f"  asked for and left in float: {reason}" for reason in decision.left]
    shown: set[str] = set()
    for what, spec, site in sites:
        lines.append(f"  {what}: {spec}")
        group = groups.get(f"{path}.{site}" if path else site)
        if group is not None:
            lines += _observer(group, name if what == "output" else what, brief=group.observer in shown)
            shown.add(group.observer)
    return "\n".join(lines if sites else [*lines, "  inside the pattern, at full precision"])


def _observer(group: GroupRecord, tensor: str, brief: bool) -> Iterator[str]:
    """The observer of one tensor, its qparams, who shares them, and what that costs; brief the second time."""
    if brief:
        yield f"    {group.observer} as well"
    else:
        ends = f"range {ends_text(*group.range)}" if group.range is not None else ""
        yield "    " + ", ".join(
            filter(None, (f"{group.observer} ({group.observer_class})", qparams_text(group), ends))
        )
        if len(group.members) > 1:
            yield f"    shared by {_some(group.members)}"
        yield from (f"    instead of the one that was asked for on {text}" for text in group.dropped)
    if len(group.own) > 1:
        yield from (f"    {sharing_cost(own, group)}" for own in group.own if own.tensor == tensor)


def _some(members: tuple[str, ...]) -> str:
    return ", ".join(members[:_SHOWN]) + (f", ... {len(members)} in all" if len(members) > _SHOWN else "")
