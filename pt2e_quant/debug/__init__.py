"""Where numbers of one model come apart: float, converted, integer reference and what the real runtime gave."""

from .compare import compare
from .comparison import Comparison, NodeError, OutputError
from .lsb import Differences, LsbComparison, OutputComparison, TensorComparison, compare_lsb

__all__ = [
    "Comparison",
    "Differences",
    "LsbComparison",
    "NodeError",
    "OutputComparison",
    "OutputError",
    "TensorComparison",
    "compare",
    "compare_lsb",
]
