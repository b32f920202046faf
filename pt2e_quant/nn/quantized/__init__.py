"""Quantized modules: QTensors in, QTensors out. The names of torch.ao.nn.quantized."""

from torch.nn import MaxPool2d

from ..convolution import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
)
from ..embedding import (
    Embedding,
    EmbeddingBag,
)
from ..functional_modules import (
    FloatFunctional,
    FXFloatFunctional,
    QFunctional,
)
from ..normalization import (
    BatchNorm2d,
    BatchNorm3d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
)
from ..pointwise import (
    ELU,
    DeQuantize,
    Dropout,
    Hardswish,
    LeakyReLU,
    PReLU,
    Quantize,
    ReLU6,
    Sigmoid,
    Softmax,
)
from ..quantizable.attention import QuantizedMultiheadAttention as MultiheadAttention
from ..quantizable.lstm import QuantizedLSTM as LSTM
from ..quantizable.lstm import QuantizedLSTMCell as LSTMCell
from ..weighted import (
    Linear,
)
from . import dynamic, functional, reference

__all__ = [
    "ELU",
    "LSTM",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "DeQuantize",
    "Dropout",
    "Embedding",
    "EmbeddingBag",
    "FXFloatFunctional",
    "FloatFunctional",
    "GroupNorm",
    "Hardswish",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LSTMCell",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "MaxPool2d",
    "MultiheadAttention",
    "PReLU",
    "QFunctional",
    "Quantize",
    "ReLU6",
    "Sigmoid",
    "Softmax",
    "dynamic",
    "functional",
    "reference",
]
