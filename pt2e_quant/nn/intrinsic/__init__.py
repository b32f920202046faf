"""Fused modules. Their quantized forms are in `quantized`."""

from . import quantized

__all__ = ["quantized"]
