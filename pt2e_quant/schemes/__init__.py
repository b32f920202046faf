"""Every way to quantize a tensor that makes sense, in one table: format, granularity, time, and what becomes of it.

Scheme                                  a legal combination; an illegal one raises when it is built
quantization_spec                       the spec of a scheme, for an annotation; for calibration or for training
SchemeObserver, SchemeFakeQuantize      the modules of schemes that the reference's classes do not cover
choose_qparams, quantize, dequantize    the arithmetic, without state
scheme_table                            all of it as Markdown, for docs/schemes.md
"""

from __future__ import annotations

from .arithmetic import choose_qparams, dequantize, fake_quantize, quantize, ranges
from .formats import FORMATS, Format
from .modules import SchemeFakeQuantize, SchemeObserver
from .scheme import GRANULARITIES, TIMINGS, Cell, Scheme, refusal
from .spec import quantization_spec
from .table import scheme_table

__all__ = [
    "FORMATS",
    "GRANULARITIES",
    "TIMINGS",
    "Cell",
    "Format",
    "Scheme",
    "SchemeFakeQuantize",
    "SchemeObserver",
    "choose_qparams",
    "dequantize",
    "fake_quantize",
    "quantization_spec",
    "quantize",
    "ranges",
    "refusal",
    "scheme_table",
]
