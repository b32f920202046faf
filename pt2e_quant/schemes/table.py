"""The scheme table as Markdown, from the rules and formats themselves. docs/make_schemes.py writes it to a file.

Before this: `scheme`.
"""

from __future__ import annotations

from .formats import FORMATS, MX_BLOCK
from .scheme import GRANULARITIES, TIMINGS, Cell, GranularityName, Scheme, Timing, refusal

__all__ = ["scheme_table"]

_SHAPES: dict[GranularityName, tuple[str, str]] = {
    "tensor": ("`(1,)`", "`(1,)`"),
    "axis": ("`(n,)`, n = size of the dimension `axis`", "`(8,)` with `axis=0`"),
    "row": ("that of the tensor, its last dimension 1", "`(8, 1)`"),
    "token": ("that of the tensor, its last dimension 1", "`(8, 1)`"),
    "group": ("that of the tensor, its last dimension divided by `group_size`", "`(8, 3)` with `group_size=32`"),
    "block": (
        "that of the tensor, its trailing dimensions divided by those of `block_size`",
        "`(4, 2)` with `block_size=(2, 48)`",
    ),
}

_HEAD = f"""# Schemes: what a tensor can be quantized to

<!-- Written by docs/make_schemes.py from pt2e_quant/schemes; a test compares them. Edit the code instead. -->

A scheme is a format, a granularity and a time. `Scheme(dtype=..., granularity=..., timing=...)` checks it when it is
built: an illegal cell raises `SpecError` with the reason and the nearest legal one. `quantization_spec(scheme)` makes
the spec for an annotation and `quantization_spec(scheme, qat=True)` the one that trains. Every legal cell exists for
both, and both land on the same grid: what a fake quantizer returns is, bit for bit, what dequantize makes of what
quantize stored.

In the tables, a cell names the op of `torch.ops.quantized_decomposed` that `convert_pt2e` writes. **backend** means:
prepare, calibration and training work, but that dialect has no op for the scheme, so `convert_pt2e` raises
`ConversionError`; a backend with an op of its own observes with a class that has `convert(model, node)`. A number in
brackets means that the cell is illegal, for the reason of that number below. Unsigned integers and activations are
asymmetric and everything else symmetric unless `symmetric=` says otherwise; a group is converted when it is symmetric
and signed, and a row where the weight is a matrix. MX stands for the OCP Microscaling Formats (MX) Specification v1.0:
blocks of {MX_BLOCK} neighbours in the last dimension that share an exponent."""


def scheme_table() -> str:
    """Formats, granularities with the shapes of their qparams, and every cell, as one Markdown document."""
    reasons: dict[str, int] = {}
    tables = [_table(timing, text, reasons) for timing, text in TIMINGS.items()]
    parts = [_HEAD, _formats(), _granularities(), *tables, _refusals(reasons)]
    return "\n\n".join(parts) + "\n"


def _formats() -> str:
    lines = ["## Formats", "", "| dtype | stored as | elements | scale | zero point |", "|---|---|---|---|---|"]
    for of in FORMATS.values():
        scale = "float8_e8m0fnu, a power of two" if of.kind == "mx" else "float32"
        zero_point = "int64" if of.kind == "integer" else "none (0)"
        storage = str(of.storage).removeprefix("torch.")
        lines.append(f"| {of.name} | {storage} | {of.low} .. {of.high} | {scale} | {zero_point} |")
    lines += ["", "The scale of int8 per token is float64: the op that chooses it at run time returns that."]
    return "\n".join(lines)


def _granularities() -> str:
    lines = ["## Granularities", "", "| granularity | scales | shape of scale and zero point | of an (8, 96) tensor |"]
    lines.append("|---|---|---|---|")
    for name, text in GRANULARITIES.items():
        lines.append(f"| {name} | {text} | {_SHAPES[name][0]} | {_SHAPES[name][1]} |")
    return "\n".join(lines)


def _table(timing: Timing, text: str, reasons: dict[str, int]) -> str:
    lines = [f"## {timing}: {text}", "", f"| dtype | {' | '.join(GRANULARITIES)} |", "|---" * 7 + "|"]
    for dtype in FORMATS:
        cells = [_cell(Cell(dtype, granularity, timing), reasons) for granularity in GRANULARITIES]
        lines.append(f"| {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(cell: Cell, reasons: dict[str, int]) -> str:
    found = refusal(cell)
    if found:
        return f"[{reasons.setdefault(found[0], len(reasons) + 1)}]"
    symmetric = True if cell.granularity == "group" and cell.dtype.startswith("int") else None
    return Scheme(**cell._asdict(), symmetric=symmetric).op or "**backend**"


def _refusals(reasons: dict[str, int]) -> str:
    lines = ["## Why a cell is illegal", ""]
    return "\n".join([*lines, *(f"{number}. {reason[0].upper()}{reason[1:]}." for reason, number in reasons.items())])
