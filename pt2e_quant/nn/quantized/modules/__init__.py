"""The same as pt2e_quant.nn.quantized, under the reference's longer path."""

from ...embedding import EmbeddingPackedParams
from ...weighted import LinearPackedParams
from .. import *  # noqa: F403
from .. import __all__ as _short

__all__ = [*_short, "EmbeddingPackedParams", "LinearPackedParams"]
