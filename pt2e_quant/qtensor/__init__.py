"""Quantized tensors of our own: plain integers with a scale and a zero point, behind the methods of torch's."""

from . import operators  # noqa: F401  # what torch's operators do; it registers the q/dq operators as well
from .border import from_torch, to_torch
from .quantizing import dequantize, quantize_per_channel, quantize_per_tensor, quantize_per_tensor_dynamic
from .tensor import QTensor, dequantizing

__all__ = [
    "QTensor",
    "dequantize",
    "dequantizing",
    "from_torch",
    "quantize_per_channel",
    "quantize_per_tensor",
    "quantize_per_tensor_dynamic",
    "to_torch",
]
