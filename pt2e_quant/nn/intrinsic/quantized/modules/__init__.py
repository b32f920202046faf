"""The same as pt2e_quant.nn.intrinsic.quantized, under the reference's longer path."""

from .. import *  # noqa: F403
from .. import __all__ as __all__
