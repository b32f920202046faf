"""`python -m pt2e_quant.compat script.py arguments...`: run a program unchanged, with the old roots from here."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from .finder import install

__all__ = ["main"]


def main(arguments: list[str]) -> None:
    """Run a script, or with -m a module, as python itself would.

    Args:
        arguments: the script and what it gets, as in sys.argv after the name of this module.
    """
    if not arguments or arguments == ["-m"]:
        sys.exit("usage: python -m pt2e_quant.compat (script.py | -m module) arguments...")
    install()
    if arguments[0] == "-m":
        sys.argv, sys.path[0] = arguments[1:], str(Path.cwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
