"""From eager mode to PT2E: a model with stubs and qconfigs as an exported graph, and a Quantizer with the same grids.

The model is prepared where it is not yet. In a copy each observer becomes an operator that does nothing, a *tap*, so
that export notes where values become integers. The quantizer takes the taps out again, and annotates what they mark.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.library import Library

from ..checks import checked
from ..eager.hooks import is_watching, remove_hooks
from ..eager.mappings import FUNCTIONALS
from ..eager.observe import prepare
from ..errors import CaptureError, ConversionError
from ..fx.recipes import read_recipe
from ..nn.quantized import Quantize
from ..nn.stubs import DeQuantStub
from ..nn.weighted import Quantized
from ..specs import FixedQParamsQuantizationSpec, QuantizationSpecBase, range_of
from .bridge_quantizer import LEAVES, EagerQuantizer, Layer

__all__ = ["Bridge", "eager_to_pt2e"]

_LIBRARY = Library("pt2e_quant", "FRAGMENT")
_LIBRARY.define("tap(Tensor x, int point) -> Tensor")
_LIBRARY.impl("tap", lambda x, point: x.clone(), "CompositeExplicitAutograd")


@dataclass(frozen=True)
class Bridge:
    """What `prepare_pt2e(bridge.exported, bridge.quantizer)` takes.

    exported:  the float model, with taps that the quantizer takes out.
    quantizer: gives each tensor the grid that eager mode gives it.
    """

    exported: ExportedProgram
    quantizer: EagerQuantizer


@checked(ConversionError)
def eager_to_pt2e(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> Bridge:
    """A model of eager mode as PT2E takes it.

    Args:
        model: float, in evaluation mode, with qconfigs, stubs and FloatFunctionals, fused where it is to be; or what
            `prepare` made of it. One that saw data keeps the grids of its observers, and needs no calibration in PT2E;
            one that saw none is calibrated there, with the same observers. It stays as it was.
        example_inputs, example_kwargs, dynamic_shapes: of torch.export.export.

    Returns:
        The exported program, and the quantizer for `prepare_pt2e`. A module that no qconfig reaches stays float there,
        as a module that eager mode would not quantize does.

    Raises:
        CoverageError: nothing has a qconfig.
        ConversionError: the model is in training, was trained in eager mode, or is converted already.
        CaptureError: torch.export cannot export it.
    """
    _check(model)
    prepared = copy.deepcopy(model) if _is_prepared(model) else prepare(model)
    layers = {path: Layer.of(module) for path, module in prepared.named_modules() if hasattr(module, "qconfig")}
    specs = _tap_all(prepared)
    kwargs = None if example_kwargs is None else dict(example_kwargs)
    try:
        with torch.no_grad():
            exported = torch.export.export(prepared, tuple(example_inputs), kwargs, dynamic_shapes=dynamic_shapes)
    except Exception as error:
        raise CaptureError(f"eager_to_pt2e: torch.export cannot export the model: {error}") from error
    return Bridge(exported, EagerQuantizer(specs, {path: one for path, one in layers.items() if one is not None}))


def _check(model: nn.Module) -> None:
    if model.training:
        raise ConversionError("eager_to_pt2e: the model is in training mode; call model.eval() first")
    for name, module in model.named_modules():
        where = f"module {name or '(model)'!r}, {type(module).__name__}"
        if hasattr(module, "weight_fake_quant"):
            raise ConversionError(
                f"eager_to_pt2e: {where}, was trained in eager mode; convert it there, or train in PT2E from the float "
                "model (prepare_qat_pt2e)"
            )
        if isinstance(module, Quantized | Quantize):
            raise ConversionError(f"eager_to_pt2e: {where}, is converted; start from the float or the prepared model")


def _is_prepared(model: nn.Module) -> bool:
    hooks = (hook for module in model.modules() for hook in module._forward_hooks.values())
    functionals = (module for module in model.modules() if isinstance(module, FUNCTIONALS))
    observed = any(hasattr(one.activation_post_process, "calculate_qparams") for one in functionals)
    return observed or any(map(is_watching, hooks))


class _Tap(nn.Module):
    """In the place of an observer."""

    def __init__(self, point: int) -> None:
        super().__init__()
        self.point = point

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.pt2e_quant.tap(x, self.point)  # type: ignore[no-any-return]


def _tap_all(model: nn.Module) -> list[QuantizationSpecBase]:
    """Observers as taps, in place. What each tap stands for, by its number."""
    specs: list[QuantizationSpecBase] = []
    for module in list(model.modules()):
        remove_hooks(module)
        observer = module._modules.get("activation_post_process")
        spec = _spec(observer, module) if hasattr(observer, "calculate_qparams") else None
        tap = _Tap(len(specs)) if spec is not None else None
        specs += [spec] if spec is not None else []
        if isinstance(module, FUNCTIONALS):
            module.activation_post_process = tap or nn.Identity()
            continue
        module._modules.pop("activation_post_process", None)
        if isinstance(module, DeQuantStub):
            tap = _Tap(LEAVES)
        if tap is not None:
            module.register_forward_hook(lambda _module, _inputs, output, tap=tap: tap(output))
    return specs


def _spec(observer: Any, module: nn.Module) -> QuantizationSpecBase | None:
    """The grid that an observer chose; what chooses it, where it saw nothing yet; None where there is no grid."""
    recipe = read_recipe(module.qconfig.activation)  # type: ignore[union-attr]
    if recipe.spec is None or recipe.is_dynamic or not getattr(observer, "has_data", True):
        return None if recipe.is_dynamic else recipe.spec
    scale, zero_point = observer.calculate_qparams()
    # Codes are those of the type: an observer of 7 bits of uint8 chooses a grid, and eager mode clips at 8 bits.
    return FixedQParamsQuantizationSpec(recipe.dtype, float(scale), int(zero_point), *range_of(recipe.dtype))
