"""What modules become in eager mode: mappings from class to class, all views of the table of rows."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..nn import qat
from ..nn.quantized import DeQuantize, FloatFunctional, QFunctional, Quantize
from ..nn.rows import (
    dynamic_classes,
    float_class,
    qat_classes,
    quantized_classes,
    reference_classes,
    resolve,
    trained_classes,
)
from .stubs import DeQuantStub, QuantStub

__all__ = [
    "FUNCTIONALS",
    "default_custom_config",
    "default_dynamic_mapping",
    "default_qat_mapping",
    "default_reference_mapping",
    "default_static_mapping",
    "embedding_qat_mapping",
    "observable_classes",
]

_Mapping = dict[type[nn.Module], type[nn.Module]]

FUNCTIONALS = (FloatFunctional, QFunctional)
"""Classes that call their observer themselves."""

_EMBEDDINGS = ("Embedding", "EmbeddingBag")
_ON_CODES = ("Sigmoid",)  # torch's operator has a grid of its own on quantized tensors, which needs no observer
_QUANTIZABLE = ("LSTM", "MultiheadAttention")
_STUBS: _Mapping = {QuantStub: Quantize, DeQuantStub: DeQuantize}


def default_dynamic_mapping() -> _Mapping:
    """Float class, or class of training -> quantized class that takes and returns float tensors."""
    static = quantized_classes()
    made = _by_class({**dynamic_classes(), **{name: static[name] for name in _EMBEDDINGS}})
    return {**made, qat.dynamic.Linear: made[nn.Linear]}


def default_static_mapping() -> _Mapping:
    """Float class, or class of training -> quantized class that takes and returns quantized tensors."""
    forms = {name: kind for name, kind in quantized_classes().items() if name not in _ON_CODES}
    trained = {resolve(before): resolve(after) for before, after in trained_classes().items()}
    return {**_STUBS, **_by_class(forms), **{before: after for before, after in trained.items() if before and after}}


def default_reference_mapping() -> _Mapping:
    """Float class -> class that computes in float with a rounded weight."""
    return {**_STUBS, **_by_class(reference_classes())}


def default_qat_mapping() -> _Mapping:
    """Float class -> class that rounds its weight while it is trained; embeddings stay as they are."""
    return _by_class({name: kind for name, kind in qat_classes().items() if name not in _EMBEDDINGS})


def embedding_qat_mapping() -> _Mapping:
    """`default_qat_mapping`, embeddings included."""
    return _by_class(qat_classes())


def default_custom_config() -> dict[str, dict[Any, Any]]:
    """What `prepare` and `convert` do with layers that have observers inside, as 'custom config dicts'."""
    rows = [(getattr(nn, name), resolve(f"quantizable.{name}"), resolve(f"quantized.{name}")) for name in _QUANTIZABLE]
    built = [row for row in rows if all(row)]
    return {
        "float_to_observed_custom_module_class": {kind: observed for kind, observed, _ in built},
        "observed_to_quantized_custom_module_class": {observed: quantized for _, observed, quantized in built},
    }


def observable_classes() -> frozenset[type[nn.Module]]:
    """Classes without children whose output `prepare` observes: those that `convert` or `prepare_qat` can swap."""
    return frozenset((*default_static_mapping(), *embedding_qat_mapping()))


def _by_class(forms: dict[str, type[nn.Module]]) -> _Mapping:
    return {float_class(name): kind for name, kind in forms.items()}
