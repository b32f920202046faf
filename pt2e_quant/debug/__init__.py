"""Where numbers of one model come apart: float, converted, integer reference and what the real runtime gave."""

from .compare import compare
from .comparison import Comparison, NodeError, OutputError
from .effects import Effects, LayerEffect
from .lsb import Differences, LsbComparison, OutputComparison, TensorComparison, compare_lsb
from .sensitivity import exact_sensitivity, sensitivity

__all__ = [
    "Comparison",
    "Differences",
    "Effects",
    "LayerEffect",
    "LsbComparison",
    "NodeError",
    "OutputComparison",
    "OutputError",
    "TensorComparison",
    "compare",
    "compare_lsb",
    "exact_sensitivity",
    "sensitivity",
]
