"""THE table of module classes: one row for each float class says what it becomes, and with what.

Mappings from float to quantized classes, names in repr, versions of state dicts, the axis of weights and what follows a
product: all are views of a row. Classes are named here, not imported, so that their files can read their row.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..kernels import Post

__all__ = [
    "POSTS",
    "ROWS",
    "Row",
    "dynamic_classes",
    "float_class",
    "qat_classes",
    "quantized_classes",
    "reference_classes",
    "row_of",
    "trained_classes",
]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One float class.

    float:     its name below torch.nn, or below pt2e_quant.nn for 'intrinsic.*' and 'quantized.*'
    quantized, dynamic, reference, qat: what it becomes, named below pt2e_quant.nn; None where nothing does it
    kernel:    the family that computes it
    post:      what follows the product (a key of POSTS)
    dims:      spatial dimensions
    axis:      dimension of the weight that counts outputs
    shown:     the name of the quantized class in repr, after 'Quantized'
    version:   of the quantized module's state dict
    first:     float class of the product in a fused one: its fields are those of this class
    trained:   what the `qat` class becomes, where that is not `quantized`
    """

    float: str
    kernel: str
    quantized: str | None = None
    dynamic: str | None = None
    reference: str | None = None
    qat: str | None = None
    post: str = "none"
    dims: int = 0
    axis: int | None = None
    shown: str = ""
    version: int = 1
    first: str | None = None
    trained: str | None = None


def _leaky(slope: float) -> Any:
    return lambda x: nn.functional.leaky_relu(x, slope)


POSTS: dict[str, Post] = {"none": Post(), "relu": Post("relu", torch.relu), "tanh": Post("tanh", torch.tanh)}
"""What can follow a product. leaky_relu has a slope, so its module makes its own."""


def _everything(name: str, **facts: Any) -> Row:
    """A class of torch.nn that has all forms under its own name."""
    forms: Any = {"quantized": f"quantized.{name}", "dynamic": f"quantized.dynamic.{name}"}
    return Row(float=name, **forms, reference=f"quantized.reference.{name}", **facts)


def _static(name: str, kernel: str, **facts: Any) -> Row:
    return Row(float=name, kernel=kernel, quantized=f"quantized.{name}", shown=name, **facts)


def _fused(name: str, first: str, **facts: Any) -> Row:
    named: Any = {"quantized": f"intrinsic.quantized.{name}", "shown": name}
    return Row(float=f"intrinsic.{name}", first=first, **named, **facts)


def _with_norm(first: str, name: str, trained: str, **facts: Any) -> Row:
    """A product and a batch norm, which are one module in training alone."""
    forms: Any = {"qat": f"intrinsic.qat.{name}", "trained": trained}
    return Row(float=f"intrinsic.{name}", first=first, **forms, **facts)


_ROWS = (
    _everything("Linear", kernel="linear", axis=0, shown="Linear", version=3, qat="qat.Linear"),
    *(
        _everything(f"Conv{n}d", kernel="conv", dims=n, axis=0, shown=f"Conv{n}d", qat=f"qat.Conv{n}d")
        for n in (1, 2, 3)
    ),
    *(
        _everything(f"ConvTranspose{n}d", kernel="conv_transpose", dims=n, axis=1, shown=f"ConvTranspose{n}d")
        for n in (1, 2, 3)
    ),
    *(
        _fused(
            f"ConvReLU{n}d", f"Conv{n}d", kernel="conv", dims=n, axis=0, post="relu", qat=f"intrinsic.qat.ConvReLU{n}d"
        )
        for n in (1, 2, 3)
    ),
    _fused("ConvAdd2d", "Conv2d", kernel="conv_add", dims=2, axis=0),
    _fused("ConvAddReLU2d", "Conv2d", kernel="conv_add", dims=2, axis=0, post="relu"),
    *(
        _with_norm(f"Conv{n}d", f"ConvBn{n}d", f"quantized.Conv{n}d", kernel="conv", dims=n, axis=0)
        for n in (1, 2, 3)
    ),
    *(
        _with_norm(
            f"Conv{n}d", f"ConvBnReLU{n}d", f"intrinsic.quantized.ConvReLU{n}d", kernel="conv", dims=n, axis=0,
            post="relu",
        )
        for n in (1, 2, 3)
    ),
    _with_norm("Linear", "LinearBn1d", "quantized.Linear", kernel="linear", axis=0),
    _fused(
        "LinearReLU", "Linear", kernel="linear", axis=0, post="relu", version=3, qat="intrinsic.qat.LinearReLU",
        dynamic="intrinsic.quantized.dynamic.LinearReLU",
    ),
    _fused("LinearLeakyReLU", "Linear", kernel="linear", axis=0, post="leaky_relu", version=3),
    _fused("LinearTanh", "Linear", kernel="linear", axis=0, post="tanh", version=3),
    *(_static(f"BatchNorm{n}d", "norm", dims=n, version=2) for n in (2, 3)),
    *(_fused(f"BNReLU{n}d", f"BatchNorm{n}d", kernel="norm", dims=n, post="relu", version=2) for n in (2, 3)),
    *(_static(f"InstanceNorm{n}d", "norm", dims=n, version=2) for n in (1, 2, 3)),
    _static("LayerNorm", "norm"),
    _static("GroupNorm", "norm"),
    *(_static(name, "pointwise") for name in ("ReLU6", "Hardswish", "ELU", "LeakyReLU", "PReLU", "Softmax", "Dropout")),
    _static("Sigmoid", "pointwise"),
    *(
        Row(
            float=name, kernel="embedding", quantized=f"quantized.{name}", reference=f"quantized.reference.{name}",
            qat=f"qat.{name}", axis=0, shown=name,
        )
        for name in ("Embedding", "EmbeddingBag")
    ),
    Row(float="quantized.FloatFunctional", kernel="pointwise", quantized="quantized.QFunctional"),
    *(
        Row(
            float=name, kernel="recurrent", dynamic=f"quantized.dynamic.{name}",
            reference=f"quantized.reference.{name}", version=version,
        )
        for name, version in (("LSTM", 2), ("GRU", 2), ("RNNCell", 1), ("LSTMCell", 1), ("GRUCell", 1))
    ),
)  # fmt: skip

ROWS: dict[str, Row] = {row.float: row for row in _ROWS}
"""By the name of the float class."""


def row_of(module: nn.Module) -> Row | None:
    """The row of a float module, by its class or the nearest class above it that has one."""
    for kind in type(module).__mro__:
        names = (kind.__name__, f"intrinsic.{kind.__name__}", f"quantized.{kind.__name__}")
        at = 1 if "intrinsic" in kind.__module__ else 2 if "quantized" in kind.__module__ else 0
        if names[at] in ROWS:
            return ROWS[names[at]]
    return None


def quantized_classes() -> dict[str, type[nn.Module]]:
    """Float class -> statically quantized class."""
    return _view("quantized")


def dynamic_classes() -> dict[str, type[nn.Module]]:
    """Float class -> dynamically quantized class."""
    return _view("dynamic")


def reference_classes() -> dict[str, type[nn.Module]]:
    """Float class -> reference class: float arithmetic with a weight that is rounded to its grid."""
    return _view("reference")


def qat_classes() -> dict[str, type[nn.Module]]:
    """Float class -> class that rounds its weight while it is trained."""
    return _view("qat")


def trained_classes() -> dict[str, str]:
    """Name of the class in training, as in the column `qat` -> name of the quantized class."""
    return {row.qat: row.trained or row.quantized for row in ROWS.values() if row.qat}  # type: ignore[misc]


def float_class(name: str) -> type[nn.Module]:
    """The float class of a row."""
    return resolve(name) if "." in name else getattr(nn, name)  # type: ignore[return-value]


def _view(column: str) -> dict[str, type[nn.Module]]:
    found = {row.float: resolve(getattr(row, column)) for row in ROWS.values() if getattr(row, column) is not None}
    return {name: kind for name, kind in found.items() if kind is not None}


def resolve(name: str) -> type[nn.Module] | None:
    """The class of a name of the table; None where this package does not have it yet."""
    room, _, short = name.rpartition(".")
    try:
        return getattr(importlib.import_module(f"pt2e_quant.nn.{room}"), short, None)
    except ModuleNotFoundError:
        return None
