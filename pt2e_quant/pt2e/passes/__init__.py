"""Graph passes, one a file. A pass edits the graph that it is given, returns the module, and ends with `tidy`.

The engine hands in a private copy (`pt2e_quant.graph.clone`); parameters are replaced, never written to.
"""

from .fold_batch_norm import fold_batch_norm
from .fold_weights import fold_weights
from .inline_grad_mode import inline_grad_mode

__all__ = ["fold_batch_norm", "fold_weights", "inline_grad_mode"]
