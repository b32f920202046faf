"""Our own registration of the quantized_decomposed ops, for a torch that no longer ships them.

Exported graphs, ExecuTorch and Inductor know these ops by name, so their schemas and their arithmetic, down to the
order of the roundings, are fixed by what torch.ao 2.13 registers: `qparams` is free to change, this file is not.
`ops.register_quantized_decomposed` asks torch.ao first and comes here for what is missing then.

Each op is one function under a decorator with its schema, what it returns on meta tensors, and what it demands of its
arguments. The dispatcher hands over every argument by position, those after the `*` of a schema by name.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.library import Library

from .errors import SpecError

__all__ = ["NAMESPACE", "OPS", "QuantizedOp", "missing", "register", "take_empty_tensors"]

NAMESPACE = "quantized_decomposed"

_HALF = (torch.float16, torch.bfloat16)
_STORAGE = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32, torch.float8_e5m2, torch.float8_e4m3fn)

# Pieces of schemas that come back.
_NUMBERS = "Tensor input, float scale, int zero_point, int quant_min, int quant_max, ScalarType dtype"
_TENSORS = "Tensor input, Tensor scale, Tensor zero_point, int quant_min, int quant_max, ScalarType dtype"
_TENSORS2 = "Tensor input, Tensor scale, Tensor zero_point, Tensor quant_min, Tensor quant_max, ScalarType dtype"
_CHOICE = "Tensor input, int quant_min, int quant_max, float eps, ScalarType dtype"
_RANGE = "int quant_min, int quant_max, ScalarType dtype"
_OUT = "*, ScalarType? out_dtype=None"

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class QuantizedOp:
    """One op.

    compute:  the arithmetic
    meta:     empty results with the dtype and shape that `compute` gives
    check:    raises SpecError on arguments that make no sense; runs before `compute` and before `meta`
    autograd: a differentiable `compute`; None means that no gradient flows
    key:      CompositeExplicitAutograd keeps the op whole in a graph, CompositeImplicitAutograd dissolves it
    """

    schema: str
    compute: Callable[..., Any]
    meta: Callable[..., Any]
    check: Callable[..., None] | None = None
    autograd: Callable[..., Any] | None = None
    key: str = "CompositeExplicitAutograd"

    def kernels(self) -> dict[str, Callable[..., Any]]:
        """The implementation for each dispatch key."""
        found = {self.key: self.compute, "Meta": self.meta, "Autograd": self.autograd}
        if self.key == "CompositeImplicitAutograd":
            del found["Meta"]
        return {key: _checked(kernel, self.check) for key, kernel in found.items() if kernel is not None}


OPS: dict[str, QuantizedOp] = {}
"""Every op of this file by name ('choose_qparams.tensor'; without a dot it is the overload 'default')."""

_libraries: list[Library] = []  # an op lives as long as the Library that defined it


def missing(namespace: str = NAMESPACE) -> tuple[str, ...]:
    """Names of those ops of this file that nobody has registered so far."""
    return tuple(name for name in OPS if not _is_registered(namespace, name))


def register(namespace: str = NAMESPACE) -> tuple[str, ...]:
    """Register what is `missing`; the names of what was registered now."""
    names = missing(namespace)
    if names:
        library = Library(namespace, "FRAGMENT")  # a fragment leaves alone what others put into the namespace
        for name in names:
            library.define(OPS[name].schema)
            for key, kernel in OPS[name].kernels().items():
                library.impl(name, kernel, key)
        _libraries.append(library)
    return names


@functools.cache  # once in a process; what it returns has to live
def take_empty_tensors() -> Library:
    """Replace the kernels that fail on a tensor without values, which models of dynamic sizes can meet."""
    library = Library(NAMESPACE, "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces each replaced kernel
        for op in map(OPS.__getitem__, ("choose_qparams.tensor", "choose_qparams_symmetric.tensor")):
            library.impl(op.schema.partition("(")[0], op.kernels()[op.key], op.key, allow_override=True)
    return library


def _is_registered(namespace: str, name: str) -> bool:
    packet, _, overload = name.partition(".")
    # A packet may exist without the overload: ExecuTorch's kernel library defines .out variants only.
    return hasattr(getattr(getattr(torch.ops, namespace), packet, None), overload or "default")


def _checked(kernel: Callable[..., Any], check: Callable[..., None] | None) -> Callable[..., Any]:
    if check is None:
        return kernel

    def run(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return kernel(*args, **kwargs)

    return run


def _op(schema: str, meta: Callable[..., Any], **registration: Any) -> Callable[[F], F]:
    def enter(compute: F) -> F:
        OPS[schema.partition("(")[0]] = QuantizedOp(schema, compute, meta, **registration)
        return compute

    return enter


# --- results on meta tensors ------------------------------------------------------------------------------------------


def _in_last(input: Tensor, *arguments: Any) -> Tensor:
    """Like `input`, in the dtype that the last argument says."""
    return torch.empty_like(input, dtype=arguments[-1])


def _in_out_dtype(input: Tensor, *arguments: Any, out_dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(input, dtype=out_dtype or torch.float32)


def _one_pair(input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return input.new_empty(1, dtype=torch.float64), input.new_empty(1, dtype=torch.int64)


def _pair_per_token(
    input: Tensor, dtype: torch.dtype, scale: torch.dtype = torch.float64, zero_point: torch.dtype = torch.int64
) -> tuple[Tensor, Tensor]:
    shape = (*input.shape[:-1], 1)
    return input.new_empty(shape, dtype=scale), input.new_empty(shape, dtype=zero_point)


def _float_pair_per_token(input: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    own = torch.float32 if input.dtype is torch.float16 else input.dtype
    return _pair_per_token(input, dtype, own, own)


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_storage(dtype: torch.dtype, quant_min: int, quant_max: int) -> None:
    if dtype not in _STORAGE:
        raise SpecError(f"{dtype} cannot store quantized values; use one of {', '.join(map(str, _STORAGE))}")
    held = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    if quant_min < held.min or quant_max > held.max:
        raise SpecError(f"[{quant_min}, {quant_max}] is not a range of {dtype}, which holds [{held.min}, {held.max}]")


def _check_input(x: Tensor) -> None:
    if x.dtype is not torch.float32 and x.dtype not in _HALF:
        raise SpecError(f"quantization takes float32, float16 or bfloat16, got {x.dtype}; cast the tensor first")


def _check_axis(x: Tensor, axis: int) -> None:
    if not -x.dim() <= axis < x.dim():
        raise SpecError(f"axis {axis} does not exist in a tensor of {x.dim()} dimensions")


def _check_qparams(x: Tensor, scale: Any, zero_point: Any, axis: list[int]) -> None:
    if axis:
        _check_axis(x, *axis)
    elif isinstance(scale, Tensor) and not scale.numel() == zero_point.numel() == 1:
        raise SpecError(
            f"per-tensor scale and zero_point hold one element each, got {scale.numel()} and {zero_point.numel()}"
        )


def _check_quantize(x: Tensor, scale: Any, zero_point: Any, *rest: Any) -> None:
    *axis, low, high, dtype = rest
    _check_input(x)
    _check_qparams(x, scale, zero_point, axis)
    if not isinstance(low, Tensor):
        _check_storage(dtype, low, high)


def _check_dequantize(q: Tensor, scale: Any, zero_point: Any, *rest: Any, **out_dtype: Any) -> None:
    *axis, _low, _high, dtype = rest  # the range is not used: it is there for whoever reads the graph
    _check_qparams(q, scale, zero_point, axis)
    _check_storage(dtype, 0, 0)
    if q.dtype is not dtype:
        raise SpecError(f"dequantize was told {dtype}, but the tensor holds {q.dtype}")


def _check_fake_quantize(x: Tensor, scales: Tensor, zero_points: Tensor, axis: int, low: int, high: int) -> None:
    if x.dtype is not torch.float32:
        raise SpecError(f"fake_quant_per_channel takes float32, got {x.dtype}; cast the tensor first")
    _check_axis(x, axis)


def _check_choice(x: Tensor, low: int, high: int, eps: float, dtype: torch.dtype) -> None:
    _check_input(x)
    _check_storage(dtype, 0, 0)
    if not low <= 0 <= high or low == high:
        raise SpecError(f"[{low}, {high}] must hold 0 and at least one more value")


def _check_int8(x: Tensor, dtype: torch.dtype) -> None:
    if dtype is not torch.int8:
        raise SpecError(f"choose_qparams_per_token knows torch.int8 only, got {dtype}")


def _check_tokens(
    x: Tensor, scales: Tensor, zero_points: Tensor, low: int, high: int, dtype: torch.dtype, *output: Any
) -> None:
    _check_storage(dtype, low, high)
    tokens = math.prod(x.shape[:-1])
    if scales.numel() != tokens or zero_points.numel() != tokens:
        raise SpecError(
            f"{tuple(x.shape)} holds {tokens} tokens, got {scales.numel()} scales and {zero_points.numel()} zero points"
        )


def _check_groups(
    x: Tensor, scales: Tensor, zero_points: Any, low: int, high: int, dtype: Any, size: int, *output: Any
) -> None:
    if size <= 1 or x.dim() != 2:
        raise SpecError(f"groups need a matrix and group_size > 1, got {x.dim()} dimensions and group_size={size}")
    if x.shape[-1] % _group_size(x, scales, size):
        raise SpecError(f"rows of {x.shape[-1]} do not split into groups of {size}")


def _group_size(x: Tensor, scales: Tensor, size: int) -> int:
    """A row narrower than a group is one group, if it has one scale."""
    return x.shape[-1] if size > x.shape[-1] and scales.shape[-1] == 1 else size


# --- per tensor -------------------------------------------------------------------------------------------------------


@_op(f"quantize_per_tensor({_NUMBERS}) -> Tensor", _in_last, check=_check_quantize)
def _quantize(x: Tensor, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype) -> Tensor:
    return (torch.round(x.to(torch.float32) * (1.0 / scale)) + zero_point).clamp(low, high).to(dtype)


@_op(f"quantize_per_tensor.tensor({_TENSORS}) -> Tensor", _in_last, check=_check_quantize)
@_op(f"quantize_per_tensor.tensor2({_TENSORS2}) -> Tensor", _in_last, check=_check_quantize)
def _quantize_tensor(x: Tensor, scale: Tensor, zero_point: Tensor, low: Any, high: Any, dtype: torch.dtype) -> Tensor:
    low, high = int(low), int(high)
    _check_storage(dtype, low, high)
    return _quantize(x, scale.item(), int(zero_point.item()), low, high, dtype)


@_op(f"dequantize_per_tensor({_NUMBERS}, {_OUT}) -> Tensor", _in_out_dtype, check=_check_dequantize)
def _dequantize(q: Tensor, scale: float, zero_point: int, *range_: Any, out_dtype: torch.dtype | None = None) -> Tensor:
    return (q.to(out_dtype or torch.float32) - zero_point) * scale


@_op(f"dequantize_per_tensor.tensor({_TENSORS}, {_OUT}) -> Tensor", _in_out_dtype, check=_check_dequantize)
@_op(f"dequantize_per_tensor.tensor2({_TENSORS2}, {_OUT}) -> Tensor", _in_out_dtype, check=_check_dequantize)
def _dequantize_tensor(
    q: Tensor, scale: Tensor, zero_point: Tensor, *range_: Any, out_dtype: torch.dtype | None = None
) -> Tensor:
    return _dequantize(q, scale.item(), int(zero_point.item()), out_dtype=out_dtype)


# --- qparams of one tensor at run time --------------------------------------------------------------------------------


@_op(f"choose_qparams.tensor({_CHOICE}) -> (Tensor, Tensor)", _one_pair, check=_check_choice)
def _choose(x: Tensor, low: int, high: int, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    smallest, largest = _extremes(x)
    scale = _at_least((largest - smallest) / float(high - low), eps)
    zero_point = (low - torch.round(smallest / scale).to(torch.int32)).clamp(low, high)
    return scale.to(torch.float64), zero_point.to(torch.int64)


@_op(f"choose_qparams_symmetric.tensor({_CHOICE}) -> (Tensor, Tensor)", _one_pair, check=_check_choice)
def _choose_symmetric(x: Tensor, low: int, high: int, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    smallest, largest = _extremes(x)
    scale = _at_least(torch.maximum(-smallest, largest) / (float(high - low) / 2), eps).to(torch.float64)
    return scale, torch.full_like(scale, 128 if dtype is torch.uint8 else 0, dtype=torch.int64)


def _extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value, zero counted in, as tensors of one element; of no values, zero alone."""
    smallest, largest = torch.aminmax(x if x.numel() else x.new_zeros(1))
    return smallest.clamp(max=0).reshape(1), largest.clamp(min=0).reshape(1)


def _at_least(scale: Tensor, eps: float) -> Tensor:
    return torch.maximum(scale, torch.tensor([eps], dtype=torch.float32, device=scale.device))  # half becomes float32


# --- per channel ------------------------------------------------------------------------------------------------------


@_op(
    f"quantize_per_channel(Tensor input, Tensor scales, Tensor zero_points, int axis, {_RANGE}) -> Tensor",
    _in_last,
    check=_check_quantize,
)
def _quantize_channels(
    x: Tensor, scales: Tensor, zero_points: Tensor, axis: int, low: int, high: int, dtype: torch.dtype
) -> Tensor:
    steps = torch.round(x.to(torch.float32) * (1.0 / _along(scales, x, axis)))
    return (steps + _along(zero_points, x, axis)).clamp(low, high).to(dtype)


@_op(
    f"dequantize_per_channel(Tensor input, Tensor scales, Tensor? zero_points, int axis, {_RANGE}, {_OUT}) -> Tensor",
    _in_out_dtype,
    check=_check_dequantize,
)
def _dequantize_channels(
    q: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    axis: int,
    *range_: Any,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    steps = _codes(q) if zero_points is None else _codes(q) - _along(zero_points, q, axis)
    return (steps * _along(scales, q, axis)).to(out_dtype or torch.float32)


def _along(qparams: Tensor, x: Tensor, axis: int) -> Tensor:
    """One value per index of `axis`, shaped so that it broadcasts over x."""
    shape = [1] * x.dim()
    shape[axis] = qparams.shape[0]
    return qparams.view(shape)


def _codes(q: Tensor) -> Tensor:
    """q in a type in which subtracting a zero point of any integer type neither wraps nor fails."""
    return q.to(torch.float32 if q.is_floating_point() else torch.int32)


class _FakeQuantizeChannels(torch.autograd.Function):
    """Rounds, and lets the gradient through where the value was inside the range."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        steps, value = _round_channels(*arguments)
        low, high = arguments[4:]
        ctx.save_for_backward((steps >= low) & (steps <= high))
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None, None, None


@_op(
    "fake_quant_per_channel(Tensor input, Tensor scales, Tensor zero_points, int axis, int quant_min, int quant_max)"
    " -> Tensor",
    lambda x, *arguments: torch.empty_like(x),
    check=_check_fake_quantize,
    autograd=_FakeQuantizeChannels.apply,
)
def _fake_quantize_channels(*arguments: Any) -> Tensor:
    return _round_channels(*arguments)[1]


def _round_channels(
    x: Tensor, scales: Tensor, zero_points: Tensor, axis: int, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """The code of each value before it is clamped, and the value that the clamped code stands for."""
    scale, zero_point = _along(scales.to(torch.float32), x, axis), _along(zero_points.to(torch.int32), x, axis)
    steps = torch.round(x * (1.0 / scale)) + zero_point
    return steps, (steps.clamp(low, high) - zero_point) * scale


# --- per token: one scale for each row along the last dimension -------------------------------------------------------


@_op(
    "choose_qparams_per_token(Tensor input, ScalarType dtype) -> (Tensor, Tensor)",
    _float_pair_per_token,
    check=_check_int8,
)
def _choose_tokens(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    reach = x.abs().amax(dim=-1, keepdim=True)
    reach = reach.float() if reach.dtype is torch.float16 else reach  # 1e-5 / 127 vanishes in float16
    scales = reach.clamp(min=1e-5).div(127)
    return scales, torch.zeros_like(scales)


@_op(
    "_choose_qparams_per_token_asymmetric_impl(Tensor input, ScalarType dtype) -> (Tensor, Tensor)",
    _pair_per_token,
    key="CompositeImplicitAutograd",
)
@_op("choose_qparams_per_token_asymmetric(Tensor input, ScalarType dtype) -> (Tensor, Tensor)", _pair_per_token)
def _choose_tokens_asymmetric(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    low, high = -128, 127  # whatever dtype says: the kernels that this op feeds are int8
    smallest, largest = x.amin(dim=-1, keepdim=True).clamp(max=0), x.amax(dim=-1, keepdim=True).clamp(min=0)
    scale = ((largest - smallest) / float(high - low)).clamp(min=torch.finfo(torch.float32).eps)
    bottom, top = smallest / scale, largest / scale
    # Each end of the range suggests a zero point; the one whose end lies nearer to zero is taken.
    zero_point = torch.where((low + bottom) + (high + top) > 0, low - bottom, high - top)
    return scale.to(torch.float64), zero_point.clamp(low, high).round().to(torch.int64)


@_op(
    f"quantize_per_token(Tensor input, Tensor scales, Tensor zero_points, {_RANGE}) -> Tensor",
    _in_last,
    check=_check_tokens,
)
def _quantize_tokens(x: Tensor, scales: Tensor, zero_points: Tensor, low: int, high: int, dtype: torch.dtype) -> Tensor:
    return (x * (1.0 / scales) + zero_points).round().clamp(low, high).to(dtype)


@_op(
    f"dequantize_per_token(Tensor input, Tensor scales, Tensor zero_points, {_RANGE}, ScalarType output_dtype)"
    " -> Tensor",
    _in_last,
    check=_check_tokens,
)
def _dequantize_tokens(q: Tensor, scales: Tensor, zero_points: Tensor, *rest: Any) -> Tensor:
    return ((_codes(q) - zero_points) * scales).to(rest[-1])


# --- per group: one scale for each group_size neighbours in a row of a matrix -----------------------------------------


@_op(
    f"quantize_per_channel_group(Tensor input, Tensor scales, Tensor zero_points, {_RANGE}, int group_size) -> Tensor",
    lambda x, *arguments: _in_last(x, *arguments[:-1]),
    check=_check_groups,
)
def _quantize_groups(
    x: Tensor, scales: Tensor, zero_points: Tensor, low: int, high: int, dtype: torch.dtype, size: int
) -> Tensor:
    groups = x.reshape(-1, _group_size(x, scales, size))
    if groups.isnan().any():
        raise SpecError("quantize_per_channel_group: the tensor holds NaN, which no integer stands for")
    steps = groups * (1.0 / scales.reshape(-1, 1)) + zero_points.reshape(-1, 1)
    return steps.round().clamp(low, high).to(dtype).reshape_as(x)


@_op(
    f"dequantize_per_channel_group(Tensor input, Tensor scales, Tensor? zero_points, {_RANGE}, int group_size,"
    " ScalarType output_dtype) -> Tensor",
    _in_last,
    check=_check_groups,
)
def _dequantize_groups(
    q: Tensor, scales: Tensor, zero_points: Tensor | None, low: int, high: int, dtype: Any, size: int, output: Any
) -> Tensor:
    steps = _codes(q).reshape(-1, _group_size(q, scales, size))
    if zero_points is not None:
        steps = steps - zero_points.reshape(-1, 1)
    return (steps * scales.reshape(-1, 1)).reshape_as(q).to(output)


# --- a cast that backends do not fuse away ----------------------------------------------------------------------------


@_op("convert_element_type.no_fuse(Tensor input, ScalarType dtype) -> Tensor", _in_last)
def _convert_element_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.ops.prims.convert_element_type.default(x, dtype)  # type: ignore[no-any-return]
