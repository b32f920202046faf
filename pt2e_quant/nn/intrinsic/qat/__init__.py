"""Fused modules in training. The names of torch.ao.nn.intrinsic.qat."""

from .fused import *  # noqa: F403
from .fused import __all__ as __all__
