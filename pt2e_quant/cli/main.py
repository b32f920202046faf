"""Entry point of the console script `pt2e-quant`. Needs the extra `cli`."""

from __future__ import annotations

import sys

from ..errors import QuantizationError

__all__ = ["main"]

_FAILED = 2  # as typer ends on a wrong argument
_INTERRUPTED = 130  # 128 + SIGINT, as shells count


def main() -> None:
    """Run one command. One that fails says why in one line, and ends with 2; one that is interrupted, with 130."""
    try:
        _run()
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


def _run() -> None:
    try:
        from .commands import app
    except ImportError:
        sys.exit('the command line needs more packages: pip install "pt2e-quant[cli]"')
    try:
        app()
    except QuantizationError as error:
        sys.stderr.write(f"{type(error).__name__}: {' '.join(str(error).split())}\n")
        sys.exit(_FAILED)
