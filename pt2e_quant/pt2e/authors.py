"""Where code of others runs inside the engine: what it raises becomes an error of ours that says whose code it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..errors import QuantizationError
from ..graph.run import on_batch
from ..observer.batch import whole_batch

__all__ = ["calibrating", "code_of"]


@contextmanager
def code_of(author: str, error: type[QuantizationError] = QuantizationError) -> Iterator[None]:
    """Around a call of what the author of a backend wrote.

    Args:
        author: what is called, and where: 'validate() of MyQuantizer'.

    Raises:
        QuantizationError: of type `error`, for whatever was raised inside, but for errors that are ours already.
    """
    try:
        yield
    except QuantizationError:
        raise
    except Exception as failure:
        raise error(
            f"{author} failed: {type(failure).__name__}: {failure}\n  This is code of the backend's author; the error "
            "that this one stems from has its lines."
        ) from failure


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Around a run of a prepared model: a batch counts as a whole, and one that does not fit is an error with a place.

    Raises:
        CalibrationError: the model failed on the batch.
    """
    with whole_batch(model), on_batch(model, "the prepared model"):
        yield
