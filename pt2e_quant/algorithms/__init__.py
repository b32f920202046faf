"""Algorithms that let fewer bits lose less, on any exported graph and for any quantizer.

Each is a function from a graph and data to the same kind of graph and an account of what it did: of a float graph,
before prepare (`rotate`, `smooth_quant`, `awq`, `equalize`, `absorb_biases`), or of a prepared and calibrated one,
before convert (`correct_bias`, `adaround`, `reconstruct_blocks`, `gptq`, `clip_weights`, `choose_ranges`). They read
what the engine planned, and know no backend. `suggest` says which of them would help a model, and applies them.

A *site* (`sites`) is a linear or a convolution with a weight of its own that is rounded on a static grid: the op, the
parameter, the observer of the weight, and the grid that this gives today. What is no site has a reason in words.

*Rounding* (`rounding`) is what convert will make of an observer, as a function of values with a gradient. So one
prepared graph is both models: with observers that let everything pass it is the float one, with observers that round it
computes what the converted graph does.

A *stream* (`stream`) holds all batches at one place of the graph: of each, the values that nodes further on still read,
in float and rounded. Algorithms go through the graph once, from site to site or from *block* to block (`blocks`: sites
of one module path up to its first number, 'layers.3', and what follows them), so that each sees in its inputs what was
done before. Memory is that of the values between two blocks for all batches, and of one block for one batch.

What an algorithm chooses leaves in two ways: a float parameter (a bias), or integers of a weight on a grid. Those are
kept as the weight that they stand for, with a `SettledObserver` in the place of the weight's own: convert then finds
the same grid, and on it the same integers, whoever wrote the quantizer.

Algorithms that take long remember finished blocks in a file (`resume`), show a bar in a terminal, and draw random
numbers from a generator of their own (`seed`).
"""

from .absorption import Absorbed, absorb_biases
from .advisor import Advice, Advised, Suggestion, Tried, suggest
from .awq import awq
from .bias_correction import Corrected, correct_bias
from .clipping import clip_weights
from .equalization import Equalized, equalize
from .fallback import Sensitivity, worst_ops
from .gptq import gptq
from .ranges import Ranged, choose_ranges
from .reconstruction import Reconstructed, adaround, reconstruct_blocks
from .rotation import Rotated, rotate
from .smooth_quant import Smoothed, smooth_quant

__all__ = [
    "Absorbed",
    "Advice",
    "Advised",
    "Corrected",
    "Equalized",
    "Ranged",
    "Reconstructed",
    "Rotated",
    "Sensitivity",
    "Smoothed",
    "Suggestion",
    "Tried",
    "absorb_biases",
    "adaround",
    "awq",
    "choose_ranges",
    "clip_weights",
    "correct_bias",
    "equalize",
    "gptq",
    "reconstruct_blocks",
    "rotate",
    "smooth_quant",
    "suggest",
    "worst_ops",
]
