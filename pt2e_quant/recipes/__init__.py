"""From a float model to a file in one call, and the recipe that says how.

A Recipe names a target, a mode and a budget; `quantize_and_lower` carries it out; what it returns saves model, report,
recipe and manifest side by side, and `check_saved` finds out whether they still belong together.
"""

from .carry_out import convert_by, quantize_and_lower
from .manifest import check_saved
from .reading import read_recipe
from .recipe import Recipe
from .result import Quantized
from .targets import find_targets

__all__ = ["Quantized", "Recipe", "check_saved", "convert_by", "find_targets", "quantize_and_lower", "read_recipe"]
