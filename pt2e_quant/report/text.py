"""A record in words: plain text, and a rich table for terminals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from ..grid import Grid
from ..pt2e.record import Decision, GroupRecord, OutputErrors, Record, Representation, SiteRange

__all__ = [
    "as_table",
    "as_text",
    "asides",
    "better_dynamic",
    "bits_lost",
    "ends_text",
    "letters",
    "qparams_text",
    "sharing_cost",
    "specs_text",
    "summary",
]

_LEGEND = (
    "Read a converted graph as: quantize, then dequantize, then a float op, then quantize again. A backend replaces\n"
    "each such pattern by one integer kernel; run without a backend it computes the same values in float."
)

_WIDEST = 48
_FEW_STEPS = 4
"""Of bell-shaped values, 8 bits over 4.5 standard deviations to each side leave 19."""

_GOOD, _ONE_BIT = 30.0, 6.0
"""In dB: what 8 bits give where nothing is wrong (docs/accuracy.md), and what a better way has to gain."""

_FEW_TITLE = (
    f"Tensors half of whose values lie within {_FEW_STEPS} steps of their median, since a few others reach far;\n"
    "keep the ops that compute them from static integers (worst_ops tells which), or quantize them dynamically"
)


def summary(record: Record) -> str:
    """One line of counts."""
    total = len(record.decisions)
    words = [
        f"{record.stage} by {record.quantizer}: {len(record.quantized)} of {total} float ops quantized",
        f"{len(record.groups)} observers for {len(record.points)} tensors",
    ]
    if record.bytes_after is not None:
        ratio = record.bytes_after / record.bytes_before if record.bytes_before else 1.0
        words.append(f"parameters {_size(record.bytes_before)} -> {_size(record.bytes_after)} ({ratio:.2f}x)")
    return "; ".join(words)


def as_text(record: Record) -> str:
    """The whole record; see `Report.text`. Specs that occur are lettered, so that the rows stay short."""
    names = letters(record)
    sections = [summary(record)]
    if record.stage == "converted":
        sections.append(_LEGEND)
    sections.append("Specs\n" + _lines(f"{letter}  {spec}" for spec, letter in names.items()))
    rows = [_quantized_row(decision, names) for decision in record.quantized]
    sections.append("Quantized\n" + _columns(("node", "op", "rule", "specs", "module", "source"), rows))
    if record.skipped:
        counts = Counter((decision.code, decision.reason) for decision in record.skipped)
        reasons = _lines(f"{count} x {reason} ({code})" for (code, reason), count in counts.most_common())
        rows = [(d.node, d.op, d.reason or "", d.module or "", d.source or "") for d in record.skipped]
        sections.append(f"Left in float, by reason\n{reasons}")
        sections.append("Left in float\n" + _columns(("node", "op", "reason", "module", "source"), rows))
    sections += _observers(record, names)
    sections += (f"{title}\n{_lines(rows)}" for title, rows in asides(record).items())
    if record.unused_rules:
        sections.append(f"Rules that matched nothing: {', '.join(record.unused_rules)}")
    return "\n\n".join(sections)


def asides(record: Record) -> dict[str, list[str]]:
    """What few models have, line by line, by title: integer borders, overlaps, integer arithmetic, folded norms."""
    borders: dict[str, dict[Any, Grid]]
    borders = {"Integer inputs": record.inputs, "Integer outputs": record.outputs, "Integer buffers": record.buffers}
    found = {
        title: [f"{i}: {q.dtype}, scale {q.scale:.6g}, zero point {q.zero_point}" for i, q in border.items()]
        for title, border in borders.items()
    }
    found["Outputs on the data of this report, against the model without rounding"] = list(_outputs(record))
    found["Wanted by another quantizer as well, which came later"] = [
        f"{d.node}: {other}" for d in record.quantized for other in d.overlaps
    ]
    found["Asked for, and left in float"] = [f"{d.node}: {reason}" for d in record.quantized for reason in d.left]
    if record.representation is not None:
        found |= _representation(record.representation)
    found["Batch norm folded"] = list(map(str, record.folded))
    return {title: rows for title, rows in found.items() if rows}


def better_dynamic(errors: OutputErrors | None) -> bool:
    """Whether outputs were measured, are poor with static activations, and much better with dynamic ones."""
    return errors is not None and errors.static < _GOOD and errors.dynamic - errors.static >= _ONE_BIT


def _outputs(record: Record) -> Iterator[str]:
    errors = record.output_errors
    if errors is None:
        return
    yield f"{errors.static:.1f} dB with static activations (SQNR)"
    yield f"{errors.dynamic:.1f} dB with the inputs of linears and convolutions quantized at run time"
    if better_dynamic(errors):
        yield (
            "so quantize dynamically (is_dynamic=True in the configuration): the whole model, or the ops that "
            f"worst_ops(exported, batches, target={_GOOD:.1f}) names"
        )
    groups = {group.observer: group for group in record.groups}
    for observer, alone in errors.alone.items():
        members = ", ".join(groups[observer].members) if observer in groups else observer
        yield f"{alone:.1f} dB with {members} rounded alone ({observer})"


def _representation(representation: Representation) -> dict[str, list[str]]:
    return {
        f"Integer arithmetic, rounding: {representation.rounding}": [
            f"{node}: {kind}" for node, kind in representation.forms.items()
        ]
        or ["nothing"],
        "Quantized, without an integer form": [f"{node}: {reason}" for node, reason in representation.left.items()],
    }


def _observers(record: Record, names: dict[str, str]) -> Iterator[str]:
    """Who shares an observer, what that costs where it was measured, and observers that another one stands in for."""
    rows = [_group_row(group, names) for group in record.groups]
    yield "Observers\n" + _columns(("observer", "spec", "qparams", "on"), rows)
    costly = sorted(
        ((bits_lost(own, group), own, group) for group in record.groups if len(group.own) > 1 for own in group.own),
        key=lambda item: -item[0],
    )
    costs = [f"{own.tensor}: {sharing_cost(own, group)}" for bits, own, group in costly if bits >= 1]
    if costs:
        yield "Tensors that lose a bit or more to sharing\n" + _lines(costs)
    few = {
        (group.observer, own.low, own.high): f"{own.tensor}: {spread_text(own, group)}"
        for group in record.groups
        for own in reversed(group.own)  # of a tensor and the moves of its values, the first is named
        if _is_few(own, group)
    }
    if few:
        yield f"{_FEW_TITLE}\n{_lines(few.values())}"
    dropped = [text for group in record.groups for text in group.dropped]
    if dropped:
        title = "Observers that were asked for and not made: another one watches the same integers"
        yield f"{title}\n{_lines(dropped)}"


def letters(record: Record) -> dict[str, str]:
    """A name for each spec that occurs: A to Z, then A1, B1, ..."""
    specs = dict.fromkeys(group.spec for group in record.groups)
    return {spec: chr(ord("A") + i % 26) + (str(i // 26) if i >= 26 else "") for i, spec in enumerate(specs)}


def _quantized_row(decision: Decision, names: dict[str, str]) -> tuple[str, ...]:
    return (
        decision.node,
        decision.op,
        decision.rule or "",
        specs_text(decision, names),
        decision.module or "",
        decision.source or "",
    )


def specs_text(decision: Decision, names: dict[str, str]) -> str:
    """The specs of a quantized op by their letters: 'x: A, weight: B -> A'."""
    words = [f"{name}: {names.get(spec, spec)}" for name, spec in decision.inputs.items()]
    output = f" -> {names.get(decision.output, decision.output)}" if decision.output else ""
    return (", ".join(words) + output).strip() or "(inside)"


def _group_row(group: GroupRecord, names: dict[str, str]) -> tuple[str, ...]:
    members = ", ".join(group.members[:8]) + (f", ... {len(group.members)} in all" if len(group.members) > 8 else "")
    return group.observer, names[group.spec], qparams_text(group), members


def _columns(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Aligned columns; a cell longer than the limit pushes only its own row."""
    if not rows:
        return "  nothing"
    widths = [min(max(map(len, column)), _WIDEST) for column in zip(titles, *rows, strict=True)]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (titles, *rows)
    )


def as_table(record: Record) -> Any:
    """A rich renderable: the summary, a table of all ops, and the reasons of those left in float."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    def cells(*values: str | None) -> list[Text]:
        return [Text(value or "") for value in values]  # a str would be read as markup: x[i](y) without its [i]

    table = Table(title=summary(record), title_justify="left")
    for column in ("node", "op", "rule", "how, or why not", "module", "source"):
        table.add_column(column, overflow="fold")
    for decision in record.decisions:
        how = decision.reason or "; ".join(
            (*decision.inputs.values(), f"-> {decision.output}" if decision.output else "")
        )
        style = None if decision.quantized else "yellow"
        row = cells(decision.node, decision.op, decision.rule or "float", how, decision.module, decision.source)
        table.add_row(*row, style=style)
    groups = Table(title="Observers", title_justify="left")
    for column in ("observer", "spec", "qparams", "shared by"):
        groups.add_column(column, overflow="fold")
    for group in record.groups:
        groups.add_row(*cells(group.observer, group.spec, qparams_text(group), ", ".join(group.members)))
    return Group(table, groups)


def qparams_text(group: GroupRecord) -> str:
    """Scale and zero point in words, '' before they are known."""
    if group.scale is None or group.zero_point is None:
        return ""
    if isinstance(group.scale, list):
        return f"{len(group.scale)} scales in [{min(group.scale):.4g}, {max(group.scale):.4g}]"
    return f"scale {group.scale:.6g}, zero point {group.zero_point}"


def sharing_cost(own: SiteRange, group: GroupRecord) -> str:
    """'own range [-1, 3], shared [-8, 8]: 2.0 bits lost': how much coarser the steps of the group are than its own."""
    bits = bits_lost(own, group)
    cost = "nothing lost" if bits < 0.05 else f"{bits:.1f} bits lost"
    if bits < -0.05:
        cost = "what lies outside is clipped"
    shared = "" if group.range is None else f", shared {ends_text(*group.range)}"
    return f"own range {ends_text(own.low, own.high)}{shared}: {cost}"


def bits_lost(own: SiteRange, group: GroupRecord) -> float:
    """log2 of the scale of the group over the scale that the tensor would have alone."""
    return math.log2(float(group.scale) / own.scale)  # type: ignore[arg-type]  # measured groups have one scale


def spread_text(own: SiteRange, group: GroupRecord) -> str:
    """'own range [-40, 60] in steps of 0.4; half of its values lie within 1.4 steps of their median'."""
    steps = own.spread / float(group.scale)  # type: ignore[arg-type,operator]  # of a tensor that was measured
    return (
        f"own range {ends_text(own.low, own.high)} in steps of {group.scale:.3g}; half of its values lie within "
        f"{steps:.1f} steps of their median"
    )


def _is_few(own: SiteRange, group: GroupRecord) -> bool:
    return own.spread is not None and own.spread < _FEW_STEPS * float(group.scale)  # type: ignore[arg-type]


def ends_text(low: float, high: float) -> str:
    return f"[{low:.4g}, {high:.4g}]"


def _lines(items: Any) -> str:
    return "\n".join(f"  {item}" for item in items) or "  nothing"


def _size(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count = count / 1000  # type: ignore[assignment]
    return f"{count:.3g} GB"
