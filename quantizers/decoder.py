"""The recipe for decoders on ExecuTorch, in one call: linears, embedding, and on request the key-value cache."""

from __future__ import annotations

from pt2e_quant.checks import checked
from pt2e_quant.errors import SpecError
from pt2e_quant.quantizer import ComposableQuantizer, QuantizationConfig, Quantizer, for_training

from .cache import CacheQuantizer, get_cache_config
from .embedding import EmbeddingQuantizer, get_embedding_config
from .xnnpack import XNNPACKQuantizer, get_8da4w_config

__all__ = ["get_decoder_quantizer"]


@checked(SpecError)
def get_decoder_quantizer(
    group_size: int = 32, embedding_bits: int = 4, integer_cache: bool = False, is_qat: bool = False
) -> ComposableQuantizer:
    """8da4w: linears with activations of 8 bits, computed while running, and weights of 4 bits in groups.

    Needs no calibration, but for `integer_cache`. An embedding of 4 bits has the integers that a linear would have: one
    that is tied to the output layer is quantized once. In the file it then stands twice, since the two kernels read
    different layouts; the program's remarks say how many bytes that is.

    Args:
        group_size: weights that share a scale, a multiple of 32.
        embedding_bits: 4, in the same groups; or 8, with a scale for each row, for embeddings that are not tied.
        integer_cache: also quantize what the model writes to its buffers, in 8 bits. Run calibration data through the
            prepared model and let convert_pt2e store the integers: integer_buffers=["*cache*"].
        is_qat: fake quantizers instead of observers, for prepare_qat_pt2e.

    Raises:
        SpecError: there is no kernel for groups of that size, or for that number of bits.
    """
    linears = get_8da4w_config(group_size, is_qat)
    table = get_embedding_config(embedding_bits, is_qat=is_qat)
    if embedding_bits == 4:
        table = QuantizationConfig(None, None, linears.weight, is_qat=is_qat)
    parts: list[Quantizer] = [EmbeddingQuantizer(table), XNNPACKQuantizer().set_global(linears)]
    cache = for_training(get_cache_config()) if is_qat else get_cache_config()
    return ComposableQuantizer([CacheQuantizer(cache), *parts] if integer_cache else parts)
