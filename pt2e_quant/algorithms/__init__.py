"""Algorithms that change a float graph, or choose what is quantized, so that fewer bits lose less."""

from .fallback import Sensitivity, worst_ops
from .smooth_quant import Smoothed, smooth_quant

__all__ = ["Sensitivity", "Smoothed", "smooth_quant", "worst_ops"]
