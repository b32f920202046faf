"""Commands on saved reports and installed quantizers. Needs the extra `cli`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from ..errors import QuantizationError
from ..quantizer.registry import find_quantizers
from ..report import Report

__all__ = ["main"]

_FAILED = 2  # as typer ends on a wrong argument


def main() -> None:
    """Entry point of the console script. A command that fails says why in one line, and ends with 2."""
    try:
        import typer
    except ImportError:
        sys.exit('the command line needs more packages: pip install "pt2e-quant[cli]"')
    app = typer.Typer(no_args_is_help=True, add_completion=False, help="Reports and quantizers of pt2e_quant.")
    for command in (quantizers, show, why):
        app.command()(command)
    try:
        app()
    except QuantizationError as error:
        sys.stderr.write(f"{type(error).__name__}: {' '.join(str(error).split())}\n")
        sys.exit(_FAILED)


def quantizers() -> None:
    """List the installed quantizers."""
    for name, point in find_quantizers().items():
        sys.stdout.write(f"{name}\t{point.value}\n")


def show(report: Annotated[Path, "a .json file that Report.save wrote"]) -> None:
    """Print a saved report: a table in a terminal, plain text otherwise."""
    Report.load(report).show()


def why(report: Annotated[Path, "a .json file that Report.save wrote"], name: str) -> None:
    """Say what became of one graph node, or of everything inside one module."""
    sys.stdout.write(Report.load(report).why(name) + "\n")
