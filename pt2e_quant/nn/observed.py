"""From what observers saw to quantized weights and grids; and what a quantized module says of a float input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import QuantizedTensorError
from ..qtensor import QTensor, from_torch, quantize_per_channel, quantize_per_tensor
from ..specs import is_per_channel, is_symmetric

__all__ = [
    "activation_grid",
    "as_quantized",
    "folded",
    "quantize_weight",
    "quantized_or_float",
    "weight_grid",
    "weight_observer",
]


def as_quantized(x: Any, module: object) -> QTensor:
    """An input of a quantized module; torch's own quantized tensor, of old code, becomes one of ours.

    Raises:
        QuantizedTensorError: it is a float tensor.
    """
    if isinstance(x, QTensor):
        return x
    if isinstance(x, Tensor) and x.is_quantized:
        return from_torch(x)  # type: ignore[no-any-return]
    name = module._get_name() if isinstance(module, nn.Module) else module
    kind = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
    raise QuantizedTensorError(
        f"{name} takes a quantized tensor, got {kind}. Put a QuantStub in front of it in the model, before prepare, or "
        "call quantize_per_tensor"
    )


def activation_grid(module: nn.Module) -> tuple[float, int]:
    """Scale and zero point that a float module's output observer chose.

    Raises:
        QuantizedTensorError: it has none.
    """
    observer = getattr(module, "activation_post_process", None)
    if observer is None or not hasattr(observer, "calculate_qparams"):
        raise QuantizedTensorError(
            f"{type(module).__name__} has no observer of its output (activation_post_process); run prepare first"
        )
    scale, zero_point = observer.calculate_qparams()
    return float(scale), int(zero_point)


def weight_observer(module: nn.Module, product: nn.Module, default: Any = None) -> Any:
    """What chooses the grid of a weight: the fake-quantizer of training, or a new observer of the qconfig.

    Raises:
        QuantizedTensorError: there is none.
    """
    if hasattr(module, "weight_fake_quant"):
        return module.weight_fake_quant
    qconfig = getattr(module, "qconfig", None) or getattr(product, "qconfig", None)
    make = getattr(qconfig, "weight", None) or default
    if make is None:
        raise QuantizedTensorError(
            f"{type(module).__name__} has no qconfig that observes its weight; set module.qconfig"
        )
    return make()


def quantize_weight(weight: Tensor, observer: Any, *, watch: bool = True) -> QTensor:
    """A float weight on the grid that its observer chooses, within the observer's own range of codes."""
    if watch:
        observer(weight)
    scale, zero_point = observer.calculate_qparams()
    inner = getattr(observer, "activation_post_process", observer)
    values = weight.detach().float()
    if inner.qscheme in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        made = quantize_per_tensor(values, float(scale), int(zero_point), inner.dtype)
    else:
        made = quantize_per_channel(values, scale, zero_point, inner.ch_axis, inner.dtype)
    if made.stored_as is torch.quint4x2:
        return made
    low, high = made.limits
    bounds = max(low, inner.quant_min), min(high, inner.quant_max)
    return made if bounds == (low, high) else made.with_codes(made.codes.clamp(*bounds))


def weight_grid(weight: Tensor, observer: Any) -> dict[str, Any]:
    """The grid that an observer chooses for a weight, as modules of nn.quantized.reference keep it."""
    observer(weight)
    inner = getattr(observer, "activation_post_process", observer)
    if inner.dtype.is_floating_point:
        return {"qscheme": None, "dtype": inner.dtype}
    scale, zero_point = observer.calculate_qparams()
    scheme = inner.qscheme
    if is_symmetric(scheme):  # a state dict has a zero point in any case
        scheme = torch.per_channel_affine if is_per_channel(scheme) else torch.per_tensor_affine
    grid = {"qscheme": scheme, "dtype": inner.dtype}
    return {**grid, "scale": scale, "zero_point": zero_point, "axis": getattr(inner, "ch_axis", 0)}


def quantized_or_float(module: nn.Module, weight: Tensor) -> Tensor:
    """One weight of a recurrent layer, int8; in float as it is where the qconfig of the layer says float16.

    Raises:
        QuantizedTensorError: there is no qconfig, or it names another type.
    """
    observer = weight_observer(module, module)
    if observer.dtype is torch.float16:
        return weight.detach().float()
    if observer.dtype is not torch.qint8:
        raise QuantizedTensorError(
            f"the weights of {type(module).__name__} become torch.qint8 or torch.float16, not {observer.dtype}; set "
            "another weight observer in its qconfig"
        )
    return quantize_weight(weight, observer)


def folded(module: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, with the batch norm of a module from quantization-aware training folded in."""
    norm = getattr(module, "bn", None)
    if norm is None:
        return module.weight, getattr(module, "bias", None)
    fusion = nn.utils.fusion
    fold = fusion.fuse_linear_bn_weights if module.weight.dim() == 2 else fusion.fuse_conv_bn_weights
    statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    return fold(module.weight, module.bias, *statistics)
