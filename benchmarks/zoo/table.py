"""The rows of a run as the tables of docs/zoo.md."""

from __future__ import annotations

from typing import Any

__all__ = ["tables"]

_WIDEST = 140


def tables(rows: list[dict[str, Any]]) -> str:
    """One table a backend."""
    found = [row for row in rows if "recipe" in row]
    return "\n\n".join(
        "\n".join(_lines(backend, [row for row in found if row["backend"] == backend]))
        for backend in dict.fromkeys(row["backend"] for row in found)
    )


def _lines(backend: str, rows: list[dict[str, Any]]) -> list[str]:
    columns = ["net", "recipe", "SQNR, dB", "program, dB", "kernels", "outside", "float, ms", "ms", "speed"]
    if backend == "xnnpack":
        columns.insert(4, "delegates")
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [_line(backend, row) for row in sorted(rows, key=lambda row: (row["family"], row["net"]))]
    slow = [row for row in rows if "where" in row]
    return [*lines, "", *(f"- {row['net']}, {row['recipe']}, {row['speed']:.2f}x: {row['where']}" for row in slow)]


def _line(backend: str, row: dict[str, Any]) -> str:
    cells = [row["net"], row["recipe"]]
    if "error" in row:
        said = row["error"] if len(row["error"]) <= _WIDEST else f"{row['error'][:_WIDEST]} ..."
        return f"| {' | '.join([*cells, said])} |" + " |" * (8 if backend == "xnnpack" else 7)
    outside = row["outside"]
    left = ", ".join(f"{count} {op}" for op, count in outside.items()) if isinstance(outside, dict) else len(outside)
    cells += [_db(row["sqnr"]), _db(row["verified"]) if row["passed"] else f"not run: {row['said']}"]
    cells += [str(row["delegates"])] if backend == "xnnpack" else []
    cells += [", ".join(f"{count} {kind}" for kind, count in row["kernels"].items()) or "none", str(left or "none")]
    cells += [f"{row['float_ms']:.2f}", f"{row['ms']:.2f}", f"{row['speed']:.2f}x"] if "speed" in row else ["", "", ""]
    return f"| {' | '.join(cells)} |"


def _db(value: float) -> str:
    return "equal" if value == float("inf") else f"{value:.1f}"
