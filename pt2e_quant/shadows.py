"""A folder of the user's that is called `quantizers` hides our package of that name: the import says so.

Python looks in the folder of the script first. `import pt2e_quant` puts a finder after all others, which is asked for
what nobody found.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

__all__ = ["explain_hidden_quantizers"]

_ROOT = Path(__file__).parents[1]


class _Explaining(MetaPathFinder):
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Raise for a module of `quantizers` that there is, but not where Python looks."""
        package, _, module = name.partition(".")
        if package == "quantizers" and (_ROOT / package / f"{module}.py").is_file():
            hiding = ", ".join(map(str, getattr(sys.modules.get(package), "__path__", ())))
            raise ModuleNotFoundError(
                f"{name} belongs to pt2e-quant ({_ROOT / package}), but Python takes {hiding} for the package "
                f"'{package}', which hides it. Rename that folder, or run the program from another one.",
                name=name,
            )


def explain_hidden_quantizers() -> None:
    """Install the finder; doing it again changes nothing."""
    if not any(isinstance(finder, _Explaining) for finder in sys.meta_path):
        sys.meta_path.append(_Explaining())
