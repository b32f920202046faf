"""The same as pt2e_quant.nn.quantized.dynamic, under the reference's longer path."""

from ....recurrent import PackedParameter, RNNBase
from ....recurrent_cells import RNNCellBase
from .. import *  # noqa: F403
from .. import __all__ as _short

__all__ = [*_short, "PackedParameter", "RNNBase", "RNNCellBase"]
