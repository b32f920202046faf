"""Finding installed quantizers, ours and third parties', through the entry-point group `pt2e_quant.quantizers`.

A package announces one in its pyproject.toml:

    [project.entry-points."pt2e_quant.quantizers"]
    mychip = "mychip.quantizer:MyChipQuantizer"
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from ..checks import checked
from ..errors import TargetingError, did_you_mean
from .base import Quantizer

__all__ = ["ENTRY_POINTS", "find_quantizers", "load_quantizer"]

ENTRY_POINTS = "pt2e_quant.quantizers"


def find_quantizers() -> dict[str, EntryPoint]:
    """Entry points of all installed quantizers by name; nothing is imported."""
    return {point.name: point for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name)}


@checked(TargetingError)
def load_quantizer(name: str) -> type[Quantizer]:
    """The quantizer class of a name.

    Raises:
        TargetingError: no installed package announces the name, or what it announces cannot be imported.
    """
    known = find_quantizers()
    if name not in known:
        raise TargetingError(f"no quantizer {name!r} is installed.{did_you_mean(name, known)}")
    try:
        loaded = known[name].load()
    except (ImportError, AttributeError) as error:
        raise TargetingError(f"quantizer {name!r} ({known[name].value}) cannot be imported: {error}") from error
    return loaded  # type: ignore[no-any-return]
