"""Where numbers of one model come apart: converted graph, integer reference and what the real runtime gave."""

from .lsb import Differences, LsbComparison, OutputComparison, TensorComparison, compare_lsb

__all__ = ["Differences", "LsbComparison", "OutputComparison", "TensorComparison", "compare_lsb"]
