"""Graph passes, one a file: GraphModule in, new GraphModule out, parameters shared, linted."""

from .fold_batch_norm import fold_batch_norm
from .fold_weights import fold_weights
from .inline_grad_mode import inline_grad_mode

__all__ = ["fold_batch_norm", "fold_weights", "inline_grad_mode"]
