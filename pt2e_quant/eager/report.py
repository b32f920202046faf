"""What eager mode did to a model: which modules were replaced, and which stayed float, with the reason."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..checks import checked
from ..errors import ConversionError

__all__ = ["Stayed", "SwapReport", "Swapped", "keep_report", "swap_report"]

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
class SwapReport:
    """All of them, in the order of the model.

    unused: keys of the user's specification that no module of the model answers to.
    """

    swapped: tuple[Swapped, ...]
    stayed: tuple[Stayed, ...]
    unused: tuple[str, ...] = ()

    def text(self) -> str:
        """The whole report, a line for each module."""
        lines = [f"{len(self.swapped)} modules quantized, {len(self.stayed)} with parameters stayed float"]
        lines += [f"  {one.name or '(model)'}: {one.before} -> {one.after}" for one in self.swapped]
        lines += [f"  {one.name or '(model)'}: {one.kind} stays float: {one.reason}" for one in self.stayed]
        return "\n".join([*lines, *(f"  no module is a {key}" for key in self.unused)])

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
            f"{type(model).__name__} has no report: it is not what quantize_dynamic returned. Ask the outermost model"
        )
    return report
