"""What every fake quantizer is: a module that rounds values to the grid they will have, and lets gradients through.

Two switches sit in buffers, as in the reference, so that they are saved and reach every replica: `observer_enabled`
(the range follows the data) and `fake_quant_enabled` (values are rounded). The functions below flip them: those of the
reference for one module, to be given to `model.apply`, and `toggle_fake_quantizers` for all of a model at once, which
says how many there were.

Before this: `observer` keeps ranges. After it: one file per way of finding the grid.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import checked
from ..errors import CaptureError, TargetingError
from ..observer.base import keeping_types
from ..observer.factory import PartialWrapper

__all__ = [
    "FakeQuantizeBase",
    "disable_fake_quant",
    "disable_observer",
    "enable_fake_quant",
    "enable_observer",
    "is_fake_quantizer",
    "recomputes",
    "straight_through",
    "toggle_fake_quantizers",
]


class FakeQuantizeBase(ABC, nn.Module):
    """A module that rounds one tensor in every forward pass.

    Buffers: `fake_quant_enabled` and `observer_enabled`, one element each, 1 for on; uint8 because NCCL has no bool.
    """

    fake_quant_enabled: Tensor
    observer_enabled: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fake_quant_enabled", torch.tensor([1], dtype=torch.uint8))
        self.register_buffer("observer_enabled", torch.tensor([1], dtype=torch.uint8))

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """x on the grid that it will be quantized to, in the dtype of x."""

    @abstractmethod
    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """(scale, zero_point) of that grid."""

    @checked(CaptureError)
    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Round values, or with False pass them on as they are."""
        self.fake_quant_enabled[0] = int(enabled)

    def disable_fake_quant(self) -> None:
        self.enable_fake_quant(False)

    @checked(CaptureError)
    def enable_observer(self, enabled: bool = True) -> None:
        """Let the range follow the data, or with False keep scale and zero point as they are."""
        self.observer_enabled[0] = int(enabled)

    def disable_observer(self) -> None:
        self.enable_observer(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FakeQuantizeBase:
        return super()._apply(keeping_types(fn), recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _watches(self) -> bool:
        """Whether the range follows the tensor of this forward."""
        return bool(self.observer_enabled[0] == 1) and not recomputes()

    @property
    def site(self) -> str:
        """What is being rounded, for error messages; the engine sets it, and the observer inside keeps it."""
        return str(getattr(getattr(self, "activation_post_process", None), "site", ""))

    @site.setter
    def site(self, text: str) -> None:
        if isinstance(inner := getattr(self, "activation_post_process", None), nn.Module):
            inner.site = text  # type: ignore[assignment]

    @property
    def where(self) -> str:
        """The beginning of an error message."""
        return self.site or f"a {type(self).__name__} outside of any graph"

    @classmethod
    def with_args(cls, **kwargs: Any) -> PartialWrapper:
        """A recipe for fake quantizers of this class with these constructor arguments."""
        return PartialWrapper(partial(cls, **kwargs))

    @classmethod
    def with_callable_args(cls, **kwargs: Callable[[], Any]) -> PartialWrapper:
        """A recipe whose arguments are made by calling these functions each time a fake quantizer is made."""
        return PartialWrapper(partial(cls), kwargs)


def straight_through(x: Tensor, value: Tensor, inside: Tensor | None) -> Tensor:
    """`value`, which is the caller's own, with the gradient of x where `inside` is true; None is true everywhere."""
    # In a tuple, value is no input, so that models may write to what they get as to any other result.
    return _StraightThrough.apply(x, (value,), inside)  # type: ignore[no-untyped-call,no-any-return]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, value: tuple[Tensor], inside: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(*(() if inside is None else (inside,)))
        return value[0]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None, None]:
        inside: tuple[Tensor, ...] = ctx.saved_tensors  # type: ignore[attr-defined]
        # As int8, since a product with bool is not vectorised.
        return gradients[0] * inside[0].view(torch.int8) if inside else gradients[0], None, None


def recomputes() -> bool:
    """Whether this forward runs inside a backward: checkpointing computes again what an observer has seen before."""
    return bool(torch._C._current_graph_task_id() != -1)


def is_fake_quantizer(module: nn.Module) -> bool:
    """True for modules, of this package or of another, that round values while training."""
    return hasattr(module, "fake_quant_enabled")


@checked(CaptureError)
def toggle_fake_quantizers(model: nn.Module, *, fake_quant: bool | None = None, observer: bool | None = None) -> int:
    """Flip the switches of every fake quantizer in a model, those of other packages included.

    Args:
        model: any module, such as a prepared one; may be a fake quantizer itself.
        fake_quant: True to round values, False to pass them on, None to leave this switch alone.
        observer: True to let ranges follow the data, False to freeze them, None to leave this switch alone.

    Returns:
        How many fake quantizers there are.

    Raises:
        TargetingError: there is none, so that the call would change nothing.
    """
    found = [module for module in model.modules() if is_fake_quantizer(module)]
    if not found:
        raise TargetingError(
            f"{type(model).__name__} holds no fake quantizer, so there is nothing to switch on or off. Observers of a "
            "model prepared for calibration round nothing; prepare it with specs whose observer_or_fake_quant_ctr is "
            "a fake quantizer. After convert, q/dq ops have taken their place."
        )
    for module in found:
        if fake_quant is not None:
            module.enable_fake_quant(fake_quant)  # type: ignore[operator]
        if observer is not None:
            module.enable_observer(observer)  # type: ignore[operator]
    return len(found)


@checked(CaptureError)
def enable_fake_quant(mod: nn.Module) -> None:
    """For `model.apply(enable_fake_quant)`: this one module rounds values, if it is a fake quantizer."""
    _switch(mod, "enable_fake_quant", True)


@checked(CaptureError)
def disable_fake_quant(mod: nn.Module) -> None:
    """For `model.apply(disable_fake_quant)`: this one module passes values on, if it is a fake quantizer."""
    _switch(mod, "enable_fake_quant", False)


@checked(CaptureError)
def enable_observer(mod: nn.Module) -> None:
    """For `model.apply(enable_observer)`: the range of this one module follows the data, if it is a fake quantizer."""
    _switch(mod, "enable_observer", True)


@checked(CaptureError)
def disable_observer(mod: nn.Module) -> None:
    """For `model.apply(disable_observer)`: the range of this one module stays, if it is a fake quantizer."""
    _switch(mod, "enable_observer", False)


def _switch(mod: nn.Module, method: str, enabled: bool) -> None:
    if is_fake_quantizer(mod):
        getattr(mod, method)(enabled)
