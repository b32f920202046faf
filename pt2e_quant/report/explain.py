"""explain(model): what was quantized, how, what was not, and why."""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CaptureError, TargetingError
from ..pt2e.record import BorderQParams, Decision, GroupRecord, PointRecord, Record, record_of
from .text import as_table, as_text, describe_decision

__all__ = ["Report", "explain"]


def explain(model: object) -> Report:
    """The report of a model that prepare_pt2e or convert_pt2e returned.

    Raises:
        CaptureError: the model carries no record of either.
    """
    record = record_of(model)
    if record is None:
        raise CaptureError(
            f"there is nothing to explain on this {type(model).__name__}: explain() takes what prepare_pt2e or "
            "convert_pt2e returned"
        )
    return Report(record)


@dataclass(frozen=True)
class Report:
    """Every float op of the model with its fate. `record` holds the values; the methods show them.

    quantized, skipped: the ops that are quantized, and those left in float with the reason
    groups:             tensors that share one observer, with their qparams once the model is converted
    unused_rules:       rules of the quantizer that fitted no node
    """

    record: Record

    @property
    def quantized(self) -> list[Decision]:
        return self.record.quantized

    @property
    def skipped(self) -> list[Decision]:
        return self.record.skipped

    @property
    def groups(self) -> list[GroupRecord]:
        return self.record.groups

    @property
    def inputs(self) -> dict[int, BorderQParams]:
        """Scale and zero point of each integer input (convert_pt2e(..., quantized_io=...)), by position."""
        return self.record.inputs

    @property
    def outputs(self) -> dict[int, BorderQParams]:
        """The same for integer outputs."""
        return self.record.outputs

    @property
    def buffers(self) -> dict[str, BorderQParams]:
        """The same for integer buffers (convert_pt2e(..., integer_buffers=...)), by name."""
        return self.record.buffers

    @property
    def unused_rules(self) -> list[str]:
        return self.record.unused_rules

    def why(self, name: str) -> str:
        """What became of one node, or of all nodes of a module, given by name.

        Raises:
            TargetingError: there is no such node or module.
        """
        found = [d for d in self.record.decisions if d.node == name]
        found = found or [d for d in self.record.decisions if d.module is not None and _inside(d.module, name)]
        if not found:
            known = {d.node for d in self.record.decisions} | {d.module for d in self.record.decisions if d.module}
            close = difflib.get_close_matches(name, sorted(known), n=5, cutoff=0.3)
            raise TargetingError(
                f"no op {name!r} and no module {name!r} in this report; the nearest: {', '.join(close)}"
            )
        return "\n".join(map(describe_decision, found))

    def text(self) -> str:
        """Plain text, one line per op and per shared group."""
        return as_text(self.record)

    def __str__(self) -> str:
        return self.text()

    def __rich__(self) -> Any:
        return as_table(self.record)

    def show(self) -> None:
        """Print a table when standard output is a terminal and rich is installed, plain text otherwise."""
        if sys.stdout.isatty():
            try:
                from rich.console import Console
            except ImportError:
                pass
            else:
                Console().print(self)
                return
        sys.stdout.write(self.text() + "\n")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        record = {
            field.name: getattr(self.record, field.name)
            for field in dataclasses.fields(self.record)
            if field.name not in ("example_inputs", "state")
        }
        for name in ("decisions", "points", "groups"):
            record[name] = [dataclasses.asdict(item) for item in record[name]]
        for name in ("inputs", "outputs", "buffers"):
            record[name] = {index: _border(qparams) for index, qparams in record[name].items()}
        return record

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `to_json` wrote.

        Raises:
            CaptureError: the text is not one.
        """
        try:
            fields = json.loads(text)
            fields["decisions"] = [Decision(**item) for item in fields["decisions"]]
            fields["points"] = [PointRecord(**{**p, "consumers": tuple(p["consumers"])}) for p in fields["points"]]
            fields["groups"] = [GroupRecord(**{**g, "members": tuple(g["members"])}) for g in fields["groups"]]
            for name in ("inputs", "outputs"):
                fields[name] = {int(index): _unborder(qparams) for index, qparams in fields[name].items()}
            fields["buffers"] = {name: _unborder(qparams) for name, qparams in fields["buffers"].items()}
            return cls(Record(**fields))
        except (ValueError, KeyError, TypeError) as error:
            raise CaptureError(f"this is not the JSON of a report: {type(error).__name__}: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """The report in a .json file that `save` wrote.

        Raises:
            CaptureError: there is no such file, or it holds something else.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise CaptureError(f"cannot read {path}: {error}") from error

    def save(self, path: str | Path) -> tuple[Path, Path]:
        """Write `path` + ".txt" and `path` + ".json"; the two paths."""
        text, data = Path(f"{path}.txt"), Path(f"{path}.json")
        text.write_text(self.text() + "\n", encoding="utf-8")
        data.write_text(self.to_json() + "\n", encoding="utf-8")
        return text, data


def _border(qparams: BorderQParams) -> dict[str, Any]:
    return dataclasses.asdict(qparams) | {"dtype": str(qparams.dtype).removeprefix("torch.")}


def _unborder(fields: dict[str, Any]) -> BorderQParams:
    return BorderQParams(**(fields | {"dtype": getattr(torch, fields["dtype"])}))


def _inside(module: str, wanted: str) -> bool:
    return module == wanted or module.startswith(f"{wanted}.")
