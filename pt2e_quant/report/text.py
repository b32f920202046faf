"""A record in words: plain text, and a rich table for terminals."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..pt2e.record import BorderQParams, Decision, GroupRecord, Record

__all__ = ["as_table", "as_text", "describe_decision", "summary"]

_LEGEND = (
    "Read a converted graph as: quantize, then dequantize, then a float op, then quantize again. A backend replaces\n"
    "each such pattern by one integer kernel; run without a backend it computes the same values in float."
)

_WIDEST = 48


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
    letters = _letters(record)
    sections = [summary(record)]
    if record.stage == "converted":
        sections.append(_LEGEND)
    sections.append("Specs\n" + _lines(f"{letter}  {spec}" for spec, letter in letters.items()))
    rows = [_quantized_row(decision, letters) for decision in record.quantized]
    sections.append("Quantized\n" + _columns(("node", "op", "rule", "specs", "module", "source"), rows))
    if record.skipped:
        counts = Counter(decision.reason for decision in record.skipped)
        reasons = _lines(f"{count} x {reason}" for reason, count in counts.most_common())
        rows = [(d.node, d.op, d.reason or "", d.module or "", d.source or "") for d in record.skipped]
        sections.append(f"Left in float, by reason\n{reasons}")
        sections.append("Left in float\n" + _columns(("node", "op", "reason", "module", "source"), rows))
    rows = [_group_row(group, letters) for group in record.groups]
    sections.append("Observers\n" + _columns(("observer", "spec", "qparams", "on"), rows))
    borders: dict[str, dict[Any, BorderQParams]]
    borders = {"Integer inputs": record.inputs, "Integer outputs": record.outputs, "Integer buffers": record.buffers}
    for title, border in borders.items():
        if border:
            words = (f"{i}: {q.dtype}, scale {q.scale:.6g}, zero point {q.zero_point}" for i, q in border.items())
            sections.append(f"{title}\n" + _lines(words))
    if record.folded:
        sections.append("Batch norm folded\n" + _lines(record.folded))
    if record.unused_rules:
        sections.append(f"Rules that fitted nothing: {', '.join(record.unused_rules)}")
    return "\n\n".join(sections)


def _letters(record: Record) -> dict[str, str]:
    """A name for each spec that occurs: A to Z, then A1, B1, ..."""
    specs = dict.fromkeys(group.spec for group in record.groups)
    return {spec: chr(ord("A") + i % 26) + (str(i // 26) if i >= 26 else "") for i, spec in enumerate(specs)}


def _quantized_row(decision: Decision, letters: dict[str, str]) -> tuple[str, ...]:
    words = [f"{name}: {letters.get(spec, spec)}" for name, spec in decision.inputs.items()]
    specs = ", ".join(words) + (f" -> {letters.get(decision.output, decision.output)}" if decision.output else "")
    return (
        decision.node,
        decision.op,
        decision.rule or "",
        specs.strip() or "(inside)",
        decision.module or "",
        decision.source or "",
    )


def _group_row(group: GroupRecord, letters: dict[str, str]) -> tuple[str, ...]:
    members = ", ".join(group.members[:8]) + (f", ... {len(group.members)} in all" if len(group.members) > 8 else "")
    return group.observer, letters[group.spec], _qparams(group), members


def _columns(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Aligned columns; a cell longer than the limit pushes only its own row."""
    if not rows:
        return "  nothing"
    widths = [min(max(map(len, column)), _WIDEST) for column in zip(titles, *rows, strict=True)]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (titles, *rows)
    )


def describe_decision(decision: Decision) -> str:
    """One op in full, over a few lines."""
    where = ", ".join(place for place in (decision.module, decision.source) if place)
    head = f"{decision.node} = {decision.op}" + (f"   [{where}]" if where else "")
    if not decision.quantized:
        return f"{head}\n  float: {decision.reason}"
    lines = [f"  {name}: {spec}" for name, spec in decision.inputs.items()]
    if decision.output is not None:
        lines.append(f"  output: {decision.output}")
    return "\n".join((head, f"  quantized by {decision.rule}", *(lines or ["  inside the pattern, at full precision"])))


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
        groups.add_row(*cells(group.observer, group.spec, _qparams(group), ", ".join(group.members)))
    return Group(table, groups)


def _qparams(group: GroupRecord) -> str:
    if group.scale is None or group.zero_point is None:
        return ""
    if isinstance(group.scale, list):
        return f"{len(group.scale)} scales in [{min(group.scale):.4g}, {max(group.scale):.4g}]"
    return f"scale {group.scale:.6g}, zero point {group.zero_point}"


def _lines(items: Any) -> str:
    return "\n".join(f"  {item}" for item in items) or "  nothing"


def _size(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count = count / 1000  # type: ignore[assignment]
    return f"{count:.3g} GB"
