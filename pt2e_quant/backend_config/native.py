"""What the kernels of this package quantize, as a BackendConfig: a view of the table of rows, and of operators."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..eager.fuse import FOLDED, fuse_known_modules, is_known
from ..nn import intrinsic
from ..nn.rows import ROWS, Row, float_class, resolve
from .config import BackendConfig, BackendPatternConfig
from .dtypes import DTypeConfig, DTypeWithConstraints, ObservationType

__all__ = ["get_native_backend_config", "native"]

_SHARED = ObservationType.OUTPUT_SHARE_OBSERVER_WITH_INPUT
_APART = ObservationType.OUTPUT_USE_DIFFERENT_OBSERVER_AS_INPUT

_ACTIVATIONS = DTypeConfig(torch.quint8, torch.quint8)
_WEIGHTED = DTypeConfig(torch.quint8, torch.quint8, torch.qint8, torch.float)
_FLOAT_WEIGHT = DTypeConfig(torch.quint8, torch.quint8, torch.float, torch.float)
_DYNAMIC = DTypeConfig(torch.quint8, torch.float, torch.qint8, torch.float, is_dynamic=True)
_DYNAMIC_HALF = DTypeConfig(torch.float16, torch.float, torch.float16, torch.float, is_dynamic=True)
_TABLES = tuple(DTypeConfig(torch.float, torch.float, kind) for kind in (torch.quint8, torch.quint4x2))

_OF_KERNELS: dict[str, tuple[DTypeConfig, ...]] = {
    "linear": (_WEIGHTED, _DYNAMIC, _DYNAMIC_HALF),
    "conv": (_WEIGHTED,),
    "conv_transpose": (_WEIGHTED,),
    "norm": (_ACTIVATIONS,),
    "pointwise": (_ACTIVATIONS,),
    "recurrent": (_DYNAMIC, _DYNAMIC_HALF),
    "embedding": _TABLES,
}
"""By the kernel of a row. Layer norms have a weight that stays float."""

_RELUS = (nn.ReLU, F.relu, torch.relu, "relu")
_PRODUCTS: tuple[Any, ...] = (
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
)  # fmt: skip
_PAIRS: tuple[Any, ...] = (operator.add, torch.add, operator.mul, torch.mul)
_OWN_GRID: tuple[Any, ...] = (F.elu, F.hardswish, F.leaky_relu, F.dropout, F.instance_norm, F.group_norm, torch.matmul)
_SAME_GRID = (
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.Hardtanh, nn.Identity, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.PixelShuffle,
    nn.PixelUnshuffle, nn.ReLU, nn.ReLU6, torch.cat, torch.adaptive_avg_pool1d, F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.hardtanh, F.hardtanh_, F.interpolate, F.max_pool1d, F.max_pool2d,
    F.max_pool3d, F.pixel_shuffle, F.pixel_unshuffle, F.relu, F.relu6, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d,
    torch.relu, torch.clamp, torch.flatten, torch.mean, torch.narrow, torch.repeat_interleave, torch.transpose,
    torch.squeeze, torch.stack, torch.unsqueeze, operator.floordiv, "clamp", "contiguous", "detach",
    "detach_", "mean", "permute", "relu", "relu_", "repeat", "repeat_interleave", "reshape", "resize_",
    "squeeze", "squeeze_", "transpose", "unsqueeze", "unsqueeze_", "view",
)  # fmt: skip
_INTO_0_1 = (
    nn.Hardsigmoid, F.hardsigmoid, "hardsigmoid", "hardsigmoid_", nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid",
    "sigmoid_", nn.Softmax,
)  # fmt: skip
_INTO_NEG1_1 = (nn.Tanh, torch.tanh, F.tanh, "tanh", "tanh_")


def get_native_backend_config() -> BackendConfig:
    """The patterns that `prepare_fx` quantizes without a `backend_config`."""
    made = BackendConfig("native")
    for row in ROWS.values():
        made.set_backend_pattern_configs(_of_row(row))
    made.set_backend_pattern_configs(_fusions())
    made.set_backend_pattern_configs(_functions())
    for pattern in _SAME_GRID:
        made.set_backend_pattern_config(_config(pattern, [_ACTIVATIONS], _SHARED))
    for patterns, scale, zero_point in ((_INTO_0_1, 1 / 256, 0), (_INTO_NEG1_1, 2 / 256, 128)):
        fixed = DTypeWithConstraints(torch.quint8, 0, 255, scale_exact_match=scale, zero_point_exact_match=zero_point)
        made.set_backend_pattern_configs(_config(pattern, [DTypeConfig(fixed, fixed)]) for pattern in patterns)
    for asked in ("shape", "size"):
        made.set_backend_pattern_config(_config(asked, [_ACTIVATIONS], ObservationType.INPUT_OUTPUT_NOT_OBSERVED))
    return made


@functools.cache
def native() -> BackendConfig:
    """`get_native_backend_config()`, made once: not to be changed."""
    return get_native_backend_config()


def _config(pattern: Any, types: Sequence[DTypeConfig], observation: ObservationType = _APART) -> BackendPatternConfig:
    return BackendPatternConfig(pattern).set_observation_type(observation).set_dtype_configs(list(types))


def _of_row(row: Row) -> Iterator[BackendPatternConfig]:
    """The float class, and the class that it is trained in."""
    if row.float.startswith("quantized.") or row.post in ("leaky_relu", "tanh") or row.kernel == "conv_add":
        return
    types = (_FLOAT_WEIGHT,) if row.float == "LayerNorm" else _OF_KERNELS[row.kernel]
    first = float_class(row.first or row.float)
    reference = resolve((ROWS[row.first] if row.first else row).reference or "")
    trained = resolve(row.qat) if row.qat else None
    for kind in filter(None, (float_class(row.float), trained)):
        config = _config(kind, types).set_qat_module(None if kind is trained else trained)
        if reference is not None:
            config.set_root_module(first).set_reference_quantized_module(reference)
        yield config


def _fusions() -> Iterator[BackendPatternConfig]:
    """Modules in a row that become one."""
    containers = [getattr(intrinsic, name) for name in intrinsic.__all__]
    fused = {kind.parts: kind for kind in containers if getattr(kind, "parts", ())}
    for parts in (*FOLDED, *fused):
        if parts[-1] in (nn.LeakyReLU, nn.Tanh):
            continue
        container = fused.get(parts)
        for last in _RELUS if parts[-1] is nn.ReLU else (parts[-1],):
            config = BackendPatternConfig((*parts[:-1], last)).set_fuser_method(_fused).set_fused_module(container)
            yield config.set_dtype_configs(list(_OF_KERNELS[_kernel(parts[0])]))


def _functions() -> Iterator[BackendPatternConfig]:
    for function in _PRODUCTS:
        types = _OF_KERNELS["linear" if function is F.linear else "conv"]
        for pattern in (function, *((function, relu) for relu in _RELUS)):
            yield _config(pattern, types)._set_input_type_to_index({"weight": 1, "bias": 2})
    for function in _PAIRS:
        for pattern in (function, *((function, relu) for relu in _RELUS)):
            config = _config(pattern, [_ACTIVATIONS])
            yield config._set_num_tensor_args_to_observation_type({0: _APART, 1: _SHARED, 2: _APART})
    for function in _OWN_GRID:
        yield _config(function, [_ACTIVATIONS])._set_input_type_to_index(_PARAMETERS.get(function, {}))
    yield _config(F.layer_norm, [_FLOAT_WEIGHT])._set_input_type_to_index({"weight": 2, "bias": 3})


_PARAMETERS: dict[Any, dict[str, int]] = {
    F.group_norm: {"weight": 2, "bias": 3},
    F.instance_norm: {"running_mean": 1, "running_var": 2, "weight": 3, "bias": 4},
}
"""Positions of arguments that stay float."""


def _kernel(product: type[nn.Module]) -> str:
    return ROWS[product.__name__].kernel if product.__name__ in ROWS else "norm"


def _fused(is_qat: bool, *modules: nn.Module) -> nn.Module | None:
    """One module of several; None where they stay apart in this mode."""
    return fuse_known_modules(modules, is_qat)[0] if is_known(modules, is_qat) else None
