"""The same as pt2e_quant.nn.quantizable, under the reference's longer path."""

from .. import LSTM, LSTMCell, MultiheadAttention

__all__ = ["LSTM", "LSTMCell", "MultiheadAttention"]
