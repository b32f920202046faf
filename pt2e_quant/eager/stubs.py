"""Modules between stubs, where a model enters and leaves integers."""

from __future__ import annotations

from torch import Tensor, nn

from ..checks import checked
from ..errors import ConversionError
from ..nn.stubs import DeQuantStub, QuantStub

__all__ = ["DeQuantStub", "QuantStub", "QuantWrapper", "add_quant_dequant"]


class QuantWrapper(nn.Module):
    """A module between a QuantStub and a DeQuantStub.

    Args:
        module: takes one tensor and returns one.
    """

    @checked(ConversionError)
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        qconfig = getattr(module, "qconfig", None)
        self.quant, self.dequant, self.module = QuantStub(qconfig), DeQuantStub(qconfig), module
        self.train(module.training)

    def forward(self, X: Tensor) -> Tensor:
        return self.dequant(self.module(self.quant(X)))  # type: ignore[no-any-return]


@checked(ConversionError)
def add_quant_dequant(module: nn.Module) -> nn.Module:
    """Wrap each module without children that has a qconfig in a QuantWrapper, in place.

    Returns:
        The module; its QuantWrapper where it has no children itself.
    """
    if not any(module.children()) and getattr(module, "qconfig", None):
        return QuantWrapper(module)
    for name, child in module.named_children():
        module._modules[name] = add_quant_dequant(child)
    return module
