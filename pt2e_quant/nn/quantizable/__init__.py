"""Layers whose inner products are quantized one by one. The names of torch.ao.nn.quantizable."""

from .attention import MultiheadAttention
from .lstm import LSTM, LSTMCell

__all__ = ["LSTM", "LSTMCell", "MultiheadAttention"]
