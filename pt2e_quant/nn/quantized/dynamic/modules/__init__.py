"""The same as pt2e_quant.nn.quantized.dynamic, under the reference's longer path."""

from ....recurrent import PackedParameter, RNNBase
from ....recurrent_cells import RNNCellBase
from .. import (
    GRU,
    LSTM,
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    GRUCell,
    Linear,
    LSTMCell,
    RNNCell,
)

__all__ = [
    "GRU",
    "LSTM",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "GRUCell",
    "LSTMCell",
    "Linear",
    "PackedParameter",
    "RNNBase",
    "RNNCell",
    "RNNCellBase",
]
