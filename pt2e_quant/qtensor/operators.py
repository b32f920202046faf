"""What torch's operators do to a QTensor, in one table: on codes where that is the same, by a kernel, or an error.

Which operators only move or pick values, `ops` knows: those run on the codes. Others need qparams for their result:
where they have none, the message says which module brings them.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from .. import ops
from ..errors import QuantizedTensorError
from ..qparams import rounded
from .pooling import max_pool
from .tensor import QTensor, is_traced, wrap

__all__ = ["calling_line", "dispatch"]

aten = torch.ops.aten

Handler = Callable[..., Any]


def dispatch(func: OpOverload, args: Any, kwargs: Any, *, dequantize: bool) -> Any:
    """The result of an operator of which an argument is a QTensor.

    Args:
        func, args, kwargs: the call.
        dequantize: let operators without a form on integers compute with real numbers.

    Raises:
        QuantizedTensorError: the operator has no form on integers.
    """
    handler = _handler(func)
    if handler is not None:
        return handler(func, *args, **kwargs)
    if dequantize:
        return func(*_real(args), **_real(kwargs))
    raise QuantizedTensorError(_no_form(func))


def keeps_grid(func: object) -> bool:
    """Whether the result of an operator on a QTensor has the grid of its operand."""
    return _handler(func) in (_move, _move_one, _clone, _permute, _pad, _max_pool, _same_grid, _relu, _linear)


@functools.cache
def _handler(func: object) -> Handler | None:
    """What an operator does to QTensors; None where it has no form on integers."""
    if func in _TABLE:
        return _TABLE[func]
    if not ops.is_value_preserving(func) or ops.fills_zeros(func):
        return None
    return _move_one if _has_one_tensor(func) else _move


def fixed_grid(func: object, quant_min: int, quant_max: int) -> tuple[float, int] | None:
    """Scale and zero point of the result of an operator whose results have a known range, whatever its operand's."""
    if func not in _FIXED:
        return None
    low, high = _FIXED[func]
    scale = (high - low) / (quant_max - quant_min + 1)
    return scale, quant_min - round(low / scale)


def _no_form(func: OpOverload) -> str:
    name = func.overloadpacket.__name__.rstrip("_")
    helper = _FUNCTIONAL.get(name)
    if helper is not None:
        way = f"give the result a scale: FloatFunctional().{helper}(...) in the model, before prepare"
    else:
        way = "put a DeQuantStub before it (and a QuantStub after it), or use the module of nn.quantized that does it"
    return (
        f"{func} has no form on quantized tensors: its result would need a scale of its own.\n  {calling_line()}\n"
        f"  Way out: {way}; or `with dequantizing():`, which computes with real numbers."
    )


def calling_line() -> str:
    """The line of the user's code that is running, as 'model.py:41: x = x + y'."""
    ours = (__file__.rpartition("qtensor")[0], torch.__file__.rpartition("__init__")[0])
    frames = [frame for frame in traceback.extract_stack() if not frame.filename.startswith(ours)]
    last = frames[-1] if frames else None
    return f"{last.filename}:{last.lineno}: {last.line}" if last else "(no line of Python)"


# --- operators that move or pick values -------------------------------------------------------------------------------


def _move(func: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """On the codes: what comes out in their type is a QTensor on the grid of the first operand."""
    like = _first(args, kwargs)
    _need_one_scale(func, like)
    carrier = _carrier(func, like)

    def inside(value: Any) -> Any:
        return _codes_on(value, like).to(carrier) if isinstance(value, QTensor) else value

    results = func(*_mapped(args, inside), **_mapped(kwargs, inside))
    if func._schema.is_mutable:
        return args[0] if isinstance(args[0], QTensor) else results

    def outside(value: Any) -> Any:
        is_code = isinstance(value, Tensor) and value.dtype is carrier
        return like.with_codes(value.to(like.codes.dtype)) if is_code else value

    return _mapped(results, outside)


def _move_one(func: OpOverload, q: QTensor, *args: Any, **kwargs: Any) -> QTensor:
    """The same for an operator from one tensor to another: most of them, without a search for tensors."""
    _need_one_scale(func, q)
    codes = func(q.codes, *args, **kwargs)
    return q if codes is q.codes else q.with_codes(codes)


def _has_one_tensor(func: Any) -> bool:
    kinds, results = ([str(one.type) for one in part] for part in (func._schema.arguments, func._schema.returns))
    return (
        kinds[0] == "Tensor" == results[0]
        and "Tensor" not in str(kinds[1:] + results[1:])
        and (func not in _NEEDS_FLOATS)
    )


def _codes_on(q: QTensor, like: QTensor) -> Tensor:
    return q.codes if q is like or q.grid == like.grid else like.quantize(q.dequantize()).codes


_NEEDS_FLOATS = frozenset((*ops.UPSAMPLE_NEAREST, *ops.ADAPTIVE_MAX_POOL, aten.im2col.default)) | frozenset(
    op for op in ops.known() if ("pad" in str(op) and "reflection" in str(op)) or "replication" in str(op)
)


def _carrier(func: OpOverload, like: QTensor) -> torch.dtype:
    """The type that the operator runs in. Some have no kernel for integers; float64 holds every code."""
    return torch.float64 if func in _NEEDS_FLOATS else like.codes.dtype


def _clone(func: OpOverload, q: QTensor, *args: Any, **kwargs: Any) -> QTensor:
    """Operators that keep places, so that an axis stays where it is."""
    width = q.shape[-1] if q.stored_as is torch.quint4x2 else None
    return wrap(func(q.codes, *args, **kwargs), q.scale, q.zero_point, q.axis, q.stored_as, width)


def _to(func: OpOverload, q: QTensor, *, dtype: torch.dtype | None = None, **options: Any) -> Any:
    """Other places in memory or other devices; the scales go along. Another type: real numbers."""
    if dtype not in (None, torch.float32):
        return func(q.dequantize(), dtype=dtype, **options)
    moved = _clone(func, q, **options)
    for name in ("scale", "zero_point"):
        part = getattr(q, name)
        setattr(moved, name, part.to(moved.codes.device) if isinstance(part, Tensor) else part)
    return moved


def _permute(func: OpOverload, q: QTensor, *args: Any) -> QTensor:
    """An axis moves along.

    Raises:
        QuantizedTensorError: the axis would be gone, or two codes in a byte would lie along another dimension.
    """
    codes = func(q.codes, *args)
    if q.axis is None and q.stored_as is not torch.quint4x2:
        return q.with_codes(codes)
    marked = torch.empty([2 if dim == q.axis else 3 - 2 * (n == 1) for dim, n in enumerate(q.shape)], device="meta")
    shape = list(func(marked, *args).shape)
    if q.stored_as is torch.quint4x2 or len(shape) != codes.dim():
        _need_one_scale(func, q)
    return wrap(codes, q.scale, q.zero_point, shape.index(2), q.stored_as)


def _copy(func: OpOverload, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Between quantized tensors codes and qparams are copied; a float one is quantized on the grid that is there."""
    if not isinstance(target, QTensor):
        raise QuantizedTensorError("copy_: a quantized tensor is not copied into a float one; dequantize() it first")
    if isinstance(source, QTensor):
        if source.stored_as is not target.stored_as:
            raise QuantizedTensorError(f"copy_: {source.stored_as} does not fit into {target.stored_as}")
        target.scale, target.zero_point, target.axis = source.scale, source.zero_point, source.axis
        target.codes.copy_(source.codes, non_blocking)
    else:
        target.codes.copy_(target.quantize(source).codes)
    return target


def _pad(func: OpOverload, q: QTensor, pad: list[int], value: float = 0.0) -> QTensor:
    """What fills is the code of the number that fills."""
    _need_one_scale(func, q)
    return q.with_codes(func(q.codes, pad, q.quantize(torch.tensor(float(value))).codes.item()))


def _max_pool(
    func: OpOverload,
    q: QTensor,
    kernel: list[int],
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil: bool = False,
) -> tuple[QTensor, Tensor]:
    """The largest codes. Indices are not computed: the second result holds no data."""
    _need_one_scale(func, q)
    if is_traced():  # what backends match
        values, indices = func(q.dequantize(), kernel, stride, padding, dilation, ceil)
        return q.quantize(values), indices
    codes = max_pool(func, q.codes, (kernel, stride, padding, dilation), ceil, q.limits[0])
    return q.with_codes(codes), torch.empty(codes.shape, dtype=torch.int64, device="meta")


def _fill(func: OpOverload, q: QTensor, value: Any = 0.0) -> QTensor:
    q.codes.copy_(q.quantize(torch.as_tensor(float(value))).codes)
    return q


def _empty(func: OpOverload, q: QTensor, *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    if dtype not in (None, torch.float32):
        return func(q.codes, dtype=dtype, **options)  # type: ignore[no-any-return]
    return _clone(func, q, **options)


# --- operators on real numbers ----------------------------------------------------------------------------------------


def _compare(func: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Real numbers are compared, as grids may differ."""
    return func(*_real(args), **_real(kwargs))


def _equal(func: OpOverload, a: Tensor, b: Tensor) -> bool:
    """The same codes on the same grid."""
    if not (isinstance(a, QTensor) and isinstance(b, QTensor)):
        raise QuantizedTensorError("equal compares two quantized tensors, or two others; dequantize() one of them")
    return a.grid == b.grid and torch.equal(a.codes, b.codes)


def _same_grid(func: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Computed with real numbers, rounded to the grid of the operand. In place where the operator is."""
    like = _first(args, kwargs)
    _need_one_scale(func, like)
    plain = ops.functional(func) if func._schema.is_mutable else func
    made = like.quantize(plain(*_real(args), **_real(kwargs)))
    if not func._schema.is_mutable:
        return made
    like.codes.copy_(made.codes)
    return like


def _relu(func: OpOverload, q: QTensor) -> QTensor:
    """Codes below the zero point become the zero point."""
    if is_traced():
        return _same_grid(func, q)  # type: ignore[no-any-return]
    _need_one_scale(func, q)
    if func._schema.is_mutable:
        q.codes.clamp_(min=int(q.zero_point))
        return q
    return q.with_codes(q.codes.clamp(min=int(q.zero_point)))


def _linear(func: OpOverload, q: QTensor, *args: Any, **kwargs: Any) -> QTensor:
    """Averages and interpolations: of code - zero point, which float32 holds exactly, so that ties round to even.

    In a graph of real numbers: that is what backends match.
    """
    if is_traced():
        return _same_grid(func, q, *args, **kwargs)  # type: ignore[no-any-return]
    _need_one_scale(func, q)
    steps = func(q.codes.float().sub_(q.zero_point), *args, **kwargs)
    return q.with_codes(rounded(steps, int(q.zero_point), *q.limits, q.codes.dtype))


def _on_fixed_grid(func: OpOverload, q: QTensor) -> QTensor:
    _need_one_scale(func, q)
    scale, zero_point = fixed_grid(func, *q.limits) or (1.0, 0)
    return wrap(q.codes, scale, zero_point, None, q.stored_as).quantize(func(q.dequantize()))


def _item(func: OpOverload, q: QTensor) -> Any:
    return func(q.dequantize())


def _real(arguments: Any) -> Any:
    return _mapped(arguments, lambda value: value.dequantize() if isinstance(value, QTensor) else value)


def _first(args: Any, kwargs: Any) -> QTensor:
    found: list[QTensor] = []
    _mapped((args, kwargs), lambda value: found.append(value) if isinstance(value, QTensor) else None)
    return found[0]


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Arguments or results of an operator with each tensor changed. A tenth of the time of torch.utils._pytree."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)([_mapped(one, change) for one in value])
    if isinstance(value, dict):
        return {name: _mapped(one, change) for name, one in value.items()}
    return value


def _need_one_scale(func: OpOverload, q: QTensor) -> None:
    if q.axis is not None or q.stored_as is torch.quint4x2:
        raise QuantizedTensorError(
            f"{func} has no form on tensors of {q.stored_as} with {q.qscheme()}: dequantize()\n  {calling_line()}"
        )


# --- the table --------------------------------------------------------------------------------------------------------

_FUNCTIONAL = {"add": "add", "mul": "mul", "matmul": "matmul", "mm": "matmul", "bmm": "matmul"}
"""Operators that a method of FloatFunctional stands for."""


def _all(names: str) -> list[OpOverload]:
    packets = [getattr(aten, name) for name in names.split()]
    return [getattr(packet, overload) for packet in packets for overload in packet.overloads() if "out" not in overload]


_FIXED = {**dict.fromkeys(_all("sigmoid hardsigmoid"), (0.0, 1.0)), **dict.fromkeys(_all("tanh"), (-1.0, 1.0))}
"""Operators whose results are in [low, high)."""

_TABLE: dict[OpOverload, Handler] = {
    **dict.fromkeys(_all("clone detach alias lift_fresh"), _clone),
    **dict.fromkeys(_all("permute transpose t squeeze unsqueeze"), _permute),
    **dict.fromkeys(_all("_to_copy"), _to),
    **dict.fromkeys(_all("empty_like"), _empty),
    **dict.fromkeys(_all("copy_"), _copy),
    **dict.fromkeys(_all("fill_ zero_"), _fill),
    **dict.fromkeys(_all("constant_pad_nd"), _pad),
    **dict.fromkeys(_all("max_pool2d_with_indices max_pool3d_with_indices"), _max_pool),
    **dict.fromkeys(_all("eq ne lt le gt ge argmax argmin isnan isfinite isinf any all"), _compare),
    **dict.fromkeys(_all("equal"), _equal),
    **dict.fromkeys(_all("_local_scalar_dense dequantize"), _item),
    **dict.fromkeys(ops.RELU, _relu),
    **dict.fromkeys(
        (
            *ops.LEAKY_RELU, *ops.HARDTANH, *ops.CLAMP,
            *_all("relu6 threshold masked_fill masked_fill_ elu elu_"),
        ),
        _same_grid,
    ),
    **dict.fromkeys(
        (
            *ops.MEAN, *ops.ADAPTIVE_AVG_POOL,
            *_all(
                "_adaptive_avg_pool2d _adaptive_avg_pool3d avg_pool1d avg_pool2d avg_pool3d upsample_bilinear2d "
                "grid_sampler_2d grid_sampler_3d"
            ),
        ),
        _linear,
    ),
    **dict.fromkeys(_FIXED, _on_fixed_grid),
}  # fmt: skip
