"""Where numbers of one model come apart: float, converted, integer reference and what the real runtime gave."""

from .compare import compare
from .comparison import Comparison, NodeError, OutputError
from .effects import Effects, LayerEffect
from .lsb import Differences, LsbComparison, OutputComparison, TensorComparison, compare_lsb
from .mixed_precision import Budget, MixedPrecision, Trial, mixed_precision
from .precisions import Precisions
from .sensitivity import exact_sensitivity, sensitivity

__all__ = [
    "Budget",
    "Comparison",
    "Differences",
    "Effects",
    "LayerEffect",
    "LsbComparison",
    "MixedPrecision",
    "NodeError",
    "OutputComparison",
    "OutputError",
    "Precisions",
    "TensorComparison",
    "Trial",
    "compare",
    "compare_lsb",
    "exact_sensitivity",
    "mixed_precision",
    "sensitivity",
]
