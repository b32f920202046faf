"""What the page shows: the rows of its tables, and the script that draws its plots, put into the template."""

from __future__ import annotations

import base64
import functools
import gzip
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Protocol, runtime_checkable

from ...debug.comparison import Comparison, NodeError
from ...errors import CaptureError
from ...latency import Profile
from ...pt2e.record import Decision, GroupRecord, Record, SiteRange
from ...reasons import WAYS_OUT
from ..text import asides, bits_lost, ends_text, letters, qparams_text, specs_text, summary
from .plots import plot_data

__all__ = ["Artefact", "as_html"]


@runtime_checkable
class Artefact(Protocol):
    """A lowered program, as far as the page shows it."""

    def fate(self, node: str) -> str:
        """What a node of the converted graph became, in a few words."""

    def sections(self) -> dict[str, Sequence[Any]]:
        """What there is to tell besides the summary, by title."""


@dataclass(frozen=True)
class Layer:
    """A row of the table of layers. `decision` is one op; errors are NaN where nothing was compared."""

    decision: Decision
    how: str
    error: NodeError | None
    fate: str
    microseconds: float | None


@dataclass(frozen=True)
class Shared:
    """A tensor that shares its grid: `bits` is what that costs it."""

    own: SiteRange
    group: GroupRecord
    bits: float


def as_html(
    record: Record,
    comparison: Comparison | None,
    program: Artefact | None,
    profile: Profile | None,
    float_profile: Profile | None,
) -> str:
    """The page; see `Report.html`.

    Raises:
        CaptureError: Jinja2 or plotly is missing.
    """
    template, script = _template(), _plotly()
    return template.render(  # type: ignore[no-any-return]
        record=record,
        summary=summary(record),
        comparison=comparison,
        program=program,
        profile=profile,
        profiles={title: one for title, one in (("Quantized", profile), ("Float model", float_profile)) if one},
        layers=list(_layers(record, comparison, program, profile)),
        reasons=_reasons(record),
        letters=letters(record),
        shared=_shared(record),
        asides=asides(record),
        plots=plot_data(record, comparison),
        script=script,
        style=_file("page.css"),
        code=_file("page.js"),
    )


def _layers(
    record: Record, comparison: Comparison | None, program: Artefact | None, profile: Profile | None
) -> Iterator[Layer]:
    """In the order of the graph. An op that a quantizer's transform made has the error of the node it stems from."""
    names = letters(record)
    errors = {row.node: row for row in comparison.nodes} if comparison is not None else {}
    times = profile.of_nodes() if profile is not None else {}
    for decision in record.decisions:
        how = specs_text(decision, names) if decision.quantized else f"{decision.reason} ({decision.code})"
        error = errors.get(decision.origin) or errors.get(decision.node)
        fate = "" if program is None else program.fate(decision.node)
        yield Layer(decision, how, error, fate, times.get(decision.node))


def _reasons(record: Record) -> list[tuple[int, str, str, str]]:
    """(how many ops, reason, code, way out), the most frequent first."""
    counts = Counter((decision.code or "", decision.reason or "") for decision in record.skipped)
    return [(count, reason, code, WAYS_OUT.get(code, "")) for (code, reason), count in counts.most_common()]


def _shared(record: Record) -> list[Shared]:
    """The tensors of groups whose single ranges were measured, what costs most first."""
    rows = [
        Shared(own, group, bits_lost(own, group)) for group in record.groups if len(group.own) > 1 for own in group.own
    ]
    return sorted(rows, key=lambda row: -row.bits)


# --- template and script ----------------------------------------------------------------------------------------------


def _template() -> Any:
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as missing:
        raise _missing("Jinja2") from missing
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"db": _db, "number": _number, "qparams": qparams_text, "ends": _ends}
    return environment.from_string(_file("page.html"))


@functools.cache
def _plotly() -> str:
    """plotly's script, packed: plain it is 5 MB, and the browser unpacks it in some milliseconds."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as missing:
        raise _missing("plotly") from missing
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def _missing(package: str) -> CaptureError:
    return CaptureError(
        f"the report as HTML needs {package}, which the extra 'report' installs: pip install 'pt2e-quant[report]'"
    )


def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _db(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "exact" if value == math.inf else f"{value:.1f}"


def _number(value: float) -> str:
    """For sorting: what is no number is the worst, what is exact the best."""
    if math.isnan(value):
        return "-1e9"
    return f"{min(max(value, -1e9), 1e9):.9g}"


def _ends(range_: tuple[float, float] | None) -> str:
    return "" if range_ is None else ends_text(*range_)
