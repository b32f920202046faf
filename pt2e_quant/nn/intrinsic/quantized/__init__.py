"""Fused quantized modules. The names of torch.ao.nn.intrinsic.quantized."""

from ...fused import *  # noqa: F403
from ...fused import __all__ as _products
from ...normalization import BNReLU2d, BNReLU3d
from . import dynamic

__all__ = [*_products, "BNReLU2d", "BNReLU3d", "dynamic"]
