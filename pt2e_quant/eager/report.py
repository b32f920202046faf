"""What eager mode did to a model: which modules were replaced, and which stayed float, with the reason."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..checks import checked
from ..errors import ConversionError

__all__ = ["Meeting", "Stayed", "SwapReport", "Swapped", "keep_report", "swap_report"]

_ATTRIBUTE = "_swap_report"


@dataclass(frozen=True)
class Swapped:
    """One module that was replaced: its path, '' for the model itself, and the classes before and after."""

    name: str
    before: str
    after: str


@dataclass(frozen=True)
class Stayed:
    """One module with parameters that stayed float: its path, its class and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Meeting:
    """A place where float and quantized tensors meet, at which the converted model stops.

    name: the module whose code runs there, '' for the model itself
    what: why it stops, the line of code and the way out
    """

    name: str
    what: str

    def __str__(self) -> str:
        return f"{self.name or '(model)'}: {self.what}"


@dataclass(frozen=True)
class SwapReport:
    """All of them, in the order of the model.

    unused:   keys of the user's specification that no module of the model answers to.
    meetings: what the first calibration run found that converted modules cannot compute; None where there was none.
    """

    swapped: tuple[Swapped, ...]
    stayed: tuple[Stayed, ...]
    unused: tuple[str, ...] = ()
    meetings: tuple[Meeting, ...] | None = None

    def text(self) -> str:
        """The whole report, a line for each module."""
        lines = [f"{len(self.swapped)} modules quantized, {len(self.stayed)} with parameters stayed float"]
        lines += [f"  {one.name or '(model)'}: {one.before} -> {one.after}" for one in self.swapped]
        lines += [f"  {one.name or '(model)'}: {one.kind} stays float: {one.reason}" for one in self.stayed]
        lines += [f"  no module is a {key}" for key in self.unused]
        return "\n".join([*lines, *(f"  {one}" for one in self.meetings or ())])

    def __str__(self) -> str:
        return self.text()


def keep_report(model: nn.Module, report: SwapReport) -> None:
    """Leave the report with the model."""
    model.__dict__[_ATTRIBUTE] = report


@checked(ConversionError)
def swap_report(model: nn.Module) -> SwapReport:
    """What the last conversion did to this model.

    Raises:
        ConversionError: eager mode did not convert it.
    """
    report = model.__dict__.get(_ATTRIBUTE)
    if not isinstance(report, SwapReport):
        raise ConversionError(
            f"{type(model).__name__} has no report: it is not what quantize_dynamic or convert returned. "
            "Ask the outermost model"
        )
    return report
