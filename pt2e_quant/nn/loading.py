"""Load a quantized state dict into a model that is still float: each module that it has quantized is replaced first."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..checks import checked
from ..errors import QuantizedTensorError
from ..qtensor import QTensor, from_torch
from .embedding import Embedding
from .functional_modules import FloatFunctional, QFunctional
from .pointwise import DeQuantize, Quantize
from .recurrent import RNNBase
from .recurrent_cells import RNNCellBase
from .rows import dynamic_classes, quantized_classes, row_of
from .stubs import DeQuantStub, QuantStub
from .weighted import WeightedModule

__all__ = ["load_quantized"]


@checked(QuantizedTensorError)
def load_quantized(model: nn.Module, state_dict: Mapping[str, Any], *, dynamic: bool | None = None) -> nn.Module:
    """Replace modules in place by the quantized forms that a state dict has for them, and load it.

    Args:
        model: float, fused as it was when it was quantized; linears, convolutions and embeddings may already be
            quantized. Its QuantStubs quantize to quint8: a state dict does not say their dtype.
        state_dict: of torch.ao's modules or of ours, of any version, also without its metadata.
        dynamic: whether linears and convolutions are dynamic; None asks the versions, and takes static without them.

    Returns:
        The model; the root itself is replaced where it is such a module.

    Raises:
        QuantizedTensorError: the state dict has nothing quantized, or does not fit the model; where that is so because
            the model is not fused, the message has the list to fuse.
    """
    plain = from_torch(dict(state_dict))
    versions = getattr(state_dict, "_metadata", {})
    places = [name for name, module in model.named_modules() if _is_quantized(module, name, plain)]
    on_grids = [name for name, module in model.named_modules() if _is_on_grid(module, name, plain)]
    if not places and not on_grids:
        raise QuantizedTensorError(
            "load_quantized: no module of the model is quantized in this state dict; do the names of modules agree? "
            f"The first keys are {list(plain)[:5]}"
        )
    for name in places:
        wanted = versions.get(name, {}).get("version") == 4 if dynamic is None else dynamic
        model = _replaced(model, name, _form(model.get_submodule(name), wanted))
    for name in on_grids:
        model = _replaced(model, name, _form_on_grid(model.get_submodule(name)))
    if any(isinstance(module, Quantize) for module in model.modules()):
        for name in [name for name, module in model.named_modules() if isinstance(module, DeQuantStub)]:
            model = _replaced(model, name, DeQuantize())
    try:
        model.load_state_dict(plain)
    except RuntimeError as error:
        raise QuantizedTensorError(f"load_quantized: {error}{_advice(model, plain)}") from error
    return model


def _advice(model: nn.Module, state_dict: Mapping[str, Any]) -> str:
    """What to do about a state dict that does not fit, where it is known."""
    if any(_OF_FX.search(key) for key in state_dict):
        return (
            "\nThis state dict is that of a graph (FX mode): prepare_fx and convert_fx the float model with the same "
            "qconfig mapping, and load it into what they return"
        )
    rows = list(_unfused(model, state_dict))
    return f"\nFuse first, what follows (a ReLU) too: load_quantized(fuse_modules(model, {rows}), ...)" if rows else ""


_OF_FX = re.compile(r"(^|\.)_(packed_weight|scale|zero_point)_\d+$|_input_(scale|zero_point)_\d+$")


def _unfused(model: nn.Module, state_dict: Mapping[str, Any]) -> Iterator[list[str]]:
    """Paths of a product and of the batch norm after it, which has nothing in the state dict."""
    before = ""
    for name, module in model.named_modules():
        if isinstance(module, WeightedModule):
            before = name
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not any(
            key.startswith(f"{name}.") for key in state_dict
        ):
            yield [before, name]


def _is_quantized(module: nn.Module, name: str, state_dict: Mapping[str, Any]) -> bool:
    row, prefix = row_of(module), f"{name}." if name else ""
    if row is None or isinstance(module, _QUANTIZED) or row.kernel not in _LOADED:
        return False
    return any(prefix + key in state_dict for key in _KEYS) or isinstance(state_dict.get(f"{prefix}weight"), QTensor)


_QUANTIZED = (WeightedModule, Embedding, RNNBase, RNNCellBase)
_LOADED = ("linear", "conv", "conv_add", "conv_transpose", "embedding", "recurrent")
_KEYS = (
    *(f"_packed_params.{key}" for key in ("_packed_params", "_packed_weight", "weight")),
    "_all_weight_values.0.param",
    "_packed_weight_ih",
)
"""Each is in the state dict of one kind of quantized module, or of one of its versions."""


def _form(module: Any, dynamic: bool) -> Any:
    row = row_of(module)
    classes = dynamic_classes() if row.dynamic and (dynamic or not row.quantized) else quantized_classes()  # type: ignore[union-attr]
    kind: Any = classes[row.float]  # type: ignore[union-attr]
    if issubclass(kind, Embedding):
        return kind(module.num_embeddings, module.embedding_dim, **kind._options(module))
    return kind.empty_like(module[0] if isinstance(module, nn.Sequential) else module)


def _is_on_grid(module: nn.Module, name: str, state_dict: Mapping[str, Any]) -> bool:
    """Whether a float module is quantized to the grid (scale, zero_point) and has no weights with codes."""
    row = row_of(module)
    known = isinstance(module, (QuantStub, FloatFunctional)) or (
        row is not None and row.kernel in ("pointwise", "norm")
    )
    return known and not hasattr(module, "scale") and f"{name}.scale".lstrip(".") in state_dict


def _form_on_grid(module: Any) -> nn.Module:
    if isinstance(module, QuantStub):
        return Quantize(1.0, 0, torch.quint8)
    if isinstance(module, FloatFunctional):
        return QFunctional()
    kind: Any = quantized_classes()[row_of(module).float]  # type: ignore[union-attr]
    return kind.from_reference(module[0] if isinstance(module, nn.Sequential) else module, 1.0, 0)  # type: ignore[no-any-return]


def _replaced(model: nn.Module, name: str, made: nn.Module) -> nn.Module:
    made.train(model.training)
    if not name:
        return made
    parent, _, short = name.rpartition(".")
    setattr(model.get_submodule(parent), short, made)
    return model
