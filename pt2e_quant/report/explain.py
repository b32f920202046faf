"""explain(model): what was quantized, how, what was not, and why."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ..checks import check_fields, checked
from ..debug.comparison import Comparison
from ..errors import CaptureError, FileError, TargetingError
from ..files import open_file, write_files
from ..graph.module import collector_paused
from ..grid import Grid
from ..latency import Profile
from ..pt2e.record import Decision, GroupRecord, Record, record_of
from .html import Artefact, as_html
from .model_explorer import Column, node_data
from .ranges import measure_ranges
from .saved import record_from_json, record_to_plain
from .text import as_table, as_text
from .why import why

__all__ = ["Report", "TellsFates", "explain"]


@runtime_checkable
class TellsFates(Protocol):
    """A lowered program, as far as a report reads it."""

    def fate(self, node: str) -> str:
        """What a node of the converted graph became, in a few words."""


@checked(CaptureError)
def explain(model: object, data: Iterable[Any] | None = None) -> Report:
    """The report of a model that prepare_pt2e or convert_pt2e returned.

    Args:
        model: that model.
        data: for a prepared and calibrated model: its calibration data, or such that it did not see. Batches are a
            tensor, a tuple of arguments or a dictionary of keyword arguments. They run three times more: without
            observers, to find the range of each single tensor (`why` then says what sharing costs), with its grids, and
            with activations quantized at run time, to compare the outputs. The model stays as it was; this report alone
            says it.

    Raises:
        CaptureError: the model carries no record of either, or `data` comes with a converted model.
        CalibrationError: there is no batch in `data`.
    """
    record = record_of(model)
    if record is None:
        raise CaptureError(
            f"there is nothing to explain on this {type(model).__name__}: explain() takes what prepare_pt2e or "
            "convert_pt2e returned"
        )
    if data is not None:
        if record.stage == "converted":
            raise CaptureError(
                "explain(model, data) measures on the prepared model, but this one is converted and has no observers. "
                "Call it on what prepare_pt2e returned."
            )
        record = measure_ranges(model, record, data)  # type: ignore[arg-type]  # record_of found it on a GraphModule
    return Report(record)


@dataclass(frozen=True)
class Report:
    """Every float op of the model with its fate. `record` holds the values; the methods show them.

    quantized, skipped: the ops that are quantized, and those left in float with the reason
    groups:             tensors that share one observer, with their qparams once the model is converted
    unused_rules:       rules of the quantizer that fitted no node
    """

    record: Record

    def __post_init__(self) -> None:
        check_fields(self, CaptureError)

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
    def inputs(self) -> dict[int, Grid]:
        """Scale and zero point of each integer input (convert_pt2e(..., quantized_io=...)), by position."""
        return self.record.inputs

    @property
    def outputs(self) -> dict[int, Grid]:
        """The same for integer outputs."""
        return self.record.outputs

    @property
    def buffers(self) -> dict[str, Grid]:
        """The same for integer buffers (convert_pt2e(..., integer_buffers=...)), by name."""
        return self.record.buffers

    @property
    def unused_rules(self) -> list[str]:
        return self.record.unused_rules

    @checked(TargetingError)
    def why(self, name: str) -> str:
        """What became of one node, or of all nodes of a module, given by name.

        Of a quantized op: the rule or quantizer that took it, and for each tensor its spec, observer, qparams, who
        shares them, and after `explain(prepared, data)` what that costs. Of another: each reason, and the way out.

        Raises:
            TargetingError: there is no such node or module.
        """
        return why(self.record, name)

    @collector_paused()
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
        return record_to_plain(self.record)

    @collector_paused()
    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        """The report that `to_json` wrote.

        Raises:
            CaptureError: the text is not one.
        """
        return cls(record_from_json(text))

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """The report in a .json file that `save` wrote.

        Raises:
            CaptureError: there is no such file, or it holds something else.
        """
        try:
            with open_file(path) as file:
                return cls.from_json(file.read())
        except FileError as error:
            raise CaptureError(str(error)) from error
        except CaptureError as error:
            raise CaptureError(f"{path}: {error}") from error

    @checked(CaptureError)
    def lowered(self, program: TellsFates) -> dict[str, str]:
        """What each op of the report became in the program that its converted model was lowered to, by node.

        In the words of the backend: 'int8, delegate 0', 'not delegated: ...' with the reason, 'removed while lowering'.
        """
        return {decision.node: program.fate(decision.node) for decision in self.record.decisions}

    @checked(CaptureError)
    def to_model_explorer(self, column: Column = "decision") -> dict[str, Any]:
        """Node data for Google's Model Explorer, as plain values, to show on the float model that was exported.

        Args:
            column: 'decision', what each op became, in words and colours; or 'bits_lost', what sharing costs its
                output, where `explain(prepared, data)` measured it.
        """
        return node_data(self.record, column)

    @checked(CaptureError)
    def html(
        self,
        comparison: Comparison | None = None,
        program: Artefact | None = None,
        profile: Profile | None = None,
        float_profile: Profile | None = None,
    ) -> str:
        """One page for a browser, which needs no network. It needs the extra `report`.

        Args:
            comparison: what `pt2e_quant.debug.compare` found between the float model and this one; the page then shows
                own and inherited errors.
            program: what the converted model was lowered to; the page then says what became of each op in it.
            profile: what `program.profile(...)` measured; the page then shows the time of each kernel.
            float_profile: the same of the float model, lowered to the same backend, to stand beside it.

        Raises:
            CaptureError: the extra is not installed.
        """
        return as_html(self.record, comparison, program, profile, float_profile)

    @checked(FileError)
    def save(
        self,
        path: str | Path,
        *,
        comparison: Comparison | None = None,
        program: Artefact | None = None,
        profile: Profile | None = None,
        float_profile: Profile | None = None,
    ) -> tuple[Path, ...]:
        """Write `path` + ".txt", ".json", ".model_explorer.json" (to_model_explorer) and ".html"; the paths.

        Without the extra `report` there is no .html, and the text ends by saying so.

        Args:
            path: where, without the suffixes.
            comparison, program, profile, float_profile: as `html` takes them.

        Raises:
            FileError: one cannot be written; then all are as they were.
        """
        contents = self.contents(str(path), comparison, program, profile, float_profile)
        return write_files({f"{path}{suffix}": content for suffix, content in contents.items()})

    @checked(CaptureError)
    def contents(
        self,
        name: str = "report",
        comparison: Comparison | None = None,
        program: Artefact | None = None,
        profile: Profile | None = None,
        float_profile: Profile | None = None,
    ) -> dict[str, bytes]:
        """What `save` writes, by suffix. `name`: of the files, without it; the text may speak of them."""
        text = self.text()
        contents = {".json": self.to_json(), ".model_explorer.json": json.dumps(self.to_model_explorer(), indent=1)}
        try:
            contents[".html"] = self.html(comparison, program, profile, float_profile)
        except CaptureError as missing:
            text += f"\n\nThere is no {name}.html: {missing}"
        return {suffix: f"{content}\n".encode() for suffix, content in {".txt": text, **contents}.items()}
