"""Quantized modules under the import paths of torch.ao.nn, every class of them a view of the table in `rows`."""

from . import intrinsic, qat, quantized
from .loading import load_quantized

__all__ = ["intrinsic", "load_quantized", "qat", "quantized"]
