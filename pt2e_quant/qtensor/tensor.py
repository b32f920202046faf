"""QTensor: integers that stand for real numbers, with the methods of torch's quantized tensors.

Before this: `qparams` does the arithmetic. After it: `operators` says what each of torch's operators does to one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor

from .. import qparams
from ..checks import checked
from ..errors import QuantizedTensorError, SpecError
from ..specs import integer_range

__all__ = ["QTensor", "dequantizing", "door"]

door = checked(QuantizedTensorError, whole=True)
"""Decorates functions and modules on QTensors: no argument of theirs leads to an untyped error."""

NAMES = {torch.uint8: torch.quint8, torch.int8: torch.qint8, torch.int32: torch.qint32}
"""What the reference calls a tensor of such integers. These are names: no tensor of torch's own types is made."""
_LIMITS = {name: integer_range(name) for name in (*NAMES.values(), torch.quint4x2)}

_Q = torch.ops.quantized_decomposed
_dequantizing: ContextVar[bool] = ContextVar("dequantizing", default=False)
_callers_keys: ContextVar[Any] = ContextVar("callers_keys")


class QTensor(Tensor):
    """Integers `codes` that stand for (codes - zero_point) * scale.

    Args:
        codes: uint8, int8 or int32. With dtype torch.quint4x2 uint8, two codes in a byte along the last dimension, the
            even one in the low bits.
        scale: one positive number (or a tensor of one, where it is computed at run time), or with `axis` a tensor with
            one for each index of that dimension.
        zero_point: the code of 0.0, likewise; with `axis` integers, or floats (x = (code - zero_point) * scale, as for
            embeddings).
        axis: the dimension that has one scale per index; None for one scale in all.
        dtype: torch.quint8, qint8 or qint32, which is the default for the type of codes, or torch.quint4x2.
        width: of quint4x2, the size of the last dimension where that is odd.

    `dtype` is the reference's name of the type, and `is_quantized` is True outside of torch.compile and torch.export.
    To autograd, and to code that looks below, it is a float32 tensor made of those that `__tensor_flatten__` names.

    Raises:
        SpecError: the arguments do not fit together.
    """

    codes: Tensor
    scale: float | Tensor
    zero_point: int | Tensor
    axis: int | None
    stored_as: torch.dtype

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    @checked(SpecError)
    def __new__(
        cls: type[QTensor],
        codes: Tensor,
        scale: float | Tensor,
        zero_point: int | Tensor,
        axis: int | None = None,
        dtype: torch.dtype | None = None,
        width: int | None = None,
    ) -> QTensor:
        _check(codes, scale, zero_point, axis, dtype, width)
        return wrap(codes, scale, zero_point, axis, dtype or NAMES[codes.dtype], width)

    # --- what the reference's methods tell ----------------------------------------------------------------------------

    def int_repr(self) -> Tensor:
        """The codes, as a tensor of their own; those of quint4x2 two in a byte."""
        return self.codes.clone()

    def q_scale(self) -> float:
        """The scale, where there is one."""
        self._need_axis(False, "q_scale", "q_per_channel_scales")
        return float(self.scale)

    def q_zero_point(self) -> int:
        """The zero point, where there is one."""
        self._need_axis(False, "q_zero_point", "q_per_channel_zero_points")
        return int(self.zero_point)

    def q_per_channel_scales(self) -> Tensor:
        """The scales, one for each index of the axis: float64, or float32 where zero points are floats."""
        self._need_axis(True, "q_per_channel_scales", "q_scale")
        return cast(Tensor, self.scale)

    def q_per_channel_zero_points(self) -> Tensor:
        """The zero points, one for each index of the axis: int64, or float32."""
        self._need_axis(True, "q_per_channel_zero_points", "q_zero_point")
        return cast(Tensor, self.zero_point)

    def q_per_channel_axis(self) -> int:
        """The dimension that has one scale for each index."""
        self._need_axis(True, "q_per_channel_axis", "q_scale")
        return cast(int, self.axis)

    def qscheme(self) -> torch.qscheme:
        """How many scales there are, and whether zero points are integers."""
        if self.axis is None:
            return torch.per_tensor_affine
        floats = cast(Tensor, self.zero_point).is_floating_point()
        return torch.per_channel_affine_float_qparams if floats else torch.per_channel_affine

    def dequantize(self) -> Tensor:
        """The real numbers, in float32."""
        if self.axis is None and is_traced():
            tensor = isinstance(self.scale, Tensor)
            op = _Q.dequantize_per_tensor.tensor if tensor else _Q.dequantize_per_tensor.default
            return op(self.codes, self.scale, self.zero_point, *self.limits, self.codes.dtype)  # type: ignore[no-any-return]
        if self.qscheme() is torch.per_channel_affine and is_traced():
            parts = (self.scale, self.zero_point, self.axis, *self.limits, self.codes.dtype)
            return _Q.dequantize_per_channel(self.codes, *parts)  # type: ignore[no-any-return]
        if self.axis is None and not isinstance(self.scale, Tensor) and not isinstance(self.zero_point, Tensor):
            return self.unpacked().float().sub_(self.zero_point).mul_(self.scale)
        return qparams.dequantize(self.unpacked(), self.scale, self.zero_point, axis=self.axis)

    @property
    def is_quantized(self) -> bool:  # type: ignore[override]
        # torch refuses to trace what says so of itself; traced, this is a pair of plain tensors.
        if not is_traced() and _fake_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            raise QuantizedTensorError(
                "a QTensor is no input of an exported program, where its scale would be a constant, whatever comes in. "
                "Export a model that takes the codes (q.int_repr()) and calls QTensor(codes, scale, zero_point)"
            )
        return not is_traced()

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.stored_as

    # --- what our own code asks ---------------------------------------------------------------------------------------

    @property
    def grid(self) -> tuple[Any, ...]:
        """What two tensors must share for their codes to be comparable: dtype, scale, zero point, axis."""
        return (self.stored_as, *(_plain(part) for part in (self.scale, self.zero_point)), self.axis)

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest code."""
        return cast("tuple[int, int]", _LIMITS[self.stored_as])

    def unpacked(self) -> Tensor:
        """One code an element."""
        if self.stored_as is not torch.quint4x2:
            return self.codes
        pairs = torch.stack((self.codes & 15, self.codes >> 4), -1).flatten(-2)
        return pairs[..., : self.shape[-1]]

    def with_codes(self, codes: Tensor) -> QTensor:
        """Other codes on the same grid."""
        return wrap(codes, self.scale, self.zero_point, self.axis, self.stored_as)

    def quantize(self, x: Tensor) -> QTensor:
        """Real numbers on this grid, which has one scale."""
        low, high = self.limits
        if is_traced():
            op = _Q.quantize_per_tensor.tensor if isinstance(self.scale, Tensor) else _Q.quantize_per_tensor.default
            return self.with_codes(op(x.float(), self.scale, self.zero_point, low, high, self.codes.dtype))
        scale = torch.as_tensor(self.scale, dtype=torch.float32)
        return self.with_codes(qparams.quantize(x, scale, self.zero_point, low, high, self.codes.dtype))

    def _need_axis(self, wanted: bool, name: str, other: str) -> None:
        if (self.axis is not None) is not wanted:
            kind = "one scale in all" if wanted else "one scale for each index of an axis"
            raise SpecError(f"{name}: this tensor has {kind}; ask {other}()")

    # --- the protocols of Python and torch ----------------------------------------------------------------------------

    def resize_(self, *sizes: Any, memory_format: torch.memory_format = torch.contiguous_format) -> QTensor:  # type: ignore[override]
        """Change the shape in place; new elements are not initialised."""
        sizes = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
        self.data = self.with_codes(self.codes.resize_(sizes, memory_format=memory_format))
        return self

    def share_memory_(self) -> QTensor:
        """Move what it is made of to memory that other processes see."""
        for name in self.__tensor_flatten__()[0]:
            getattr(self, name).share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether other processes see the codes."""
        return bool(self.codes.is_shared())

    def is_floating_point(self) -> bool:
        """False, so that `half()` of a module leaves its quantized weights alone."""
        return False

    def element_size(self) -> int:
        """Bytes of a code."""
        return self.codes.element_size()

    def float(self, *_: Any, **__: Any) -> Tensor:
        """The real numbers. Below, this is a float32 tensor, of which torch would return itself."""
        return self.dequantize()

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """To another place; to torch.float32, the real numbers (see `float`)."""
        if torch.float32 in (*args, kwargs.get("dtype")):
            return self.dequantize().to(*args, **kwargs)
        return super().to(*args, **kwargs)

    def tolist(self) -> Any:
        """The real numbers, as lists."""
        return self.dequantize().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        values = repr(self.dequantize()).removesuffix(")").partition(", size=")[0]  # which torch says of empty ones
        scheme = f"quantization_scheme={self.qscheme()}, scale={self.scale}, zero_point={self.zero_point}" + (
            f", axis={self.axis}" if self.axis is not None else ""
        )
        return f"{values}, size={tuple(self.shape)}, dtype={self.stored_as}, {scheme})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        width = self.shape[-1] if self.stored_as is torch.quint4x2 else None
        return rebuild, (self.codes, self.scale, self.zero_point, self.axis, self.stored_as, width)

    def __deepcopy__(self, memo: dict[int, Any]) -> QTensor:
        made, parts = self.__reduce_ex__(None)
        memo[id(self)] = copied = made(*(copy.deepcopy(part, memo) for part in parts))
        return cast(QTensor, copied)

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        parts = ("codes", "scale", "zero_point")
        held = [name for name in parts if isinstance(getattr(self, name), Tensor)]
        rest = {name: getattr(self, name) for name in (*parts, "axis", "stored_as") if name not in held}
        return held, rest

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], rest: dict[str, Any], size: Any, stride: Any) -> QTensor:
        of = {**inner, **rest}
        width = size[-1] if of["stored_as"] is torch.quint4x2 else None
        return wrap(of["codes"], of["scale"], of["zero_point"], of["axis"], of["stored_as"], width)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        from .operators import dispatch  # its handlers make QTensors

        return dispatch(func, args, kwargs or {}, dequantize=_dequantizing.get())


class _Early(QTensor):
    """A QTensor while torch.export or a transform of functorch runs. Those see operators before __torch_dispatch__ can:
    they are let in later.

    Handlers compute with the settings of the caller, so that what they do to the codes is seen.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        c = torch._C
        keys = c._dispatch_tls_local_include_set(), c._dispatch_tls_local_exclude_set()
        token = _callers_keys.set(keys)
        try:
            with c.DisableTorchFunctionSubclass(), c._ExcludeDispatchKeyGuard(_LATER):
                return func(*args, **(kwargs or {}))
        finally:
            _callers_keys.reset(token)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        with torch._C._ForceDispatchKeyGuard(*_callers_keys.get()):
            return super().__torch_dispatch__(func, types, args, kwargs)


_KEYS = torch._C.DispatchKey
_LATER = torch._C.DispatchKeySet(_KEYS.PreDispatch)
for _key in (_KEYS.FuncTorchDynamicLayerFrontMode, _KEYS.FuncTorchDynamicLayerBackMode):
    _LATER = _LATER.add(_key)


def wrap(
    codes: Tensor,
    scale: float | Tensor,
    zero_point: int | Tensor,
    axis: int | None,
    stored_as: torch.dtype,
    width: int | None = None,
) -> QTensor:
    """A QTensor of parts that fit together: what library code calls, as nothing is checked."""
    shape, strides = codes.shape, codes.stride()
    transformed = not _is_compiling() and _transform() is not None
    offset = 0 if transformed else codes.storage_offset()  # the tensors of vmap have no memory of their own
    if stored_as is torch.quint4x2:
        shape = torch.Size((*shape[:-1], width or 2 * shape[-1]))
        strides = torch.empty(shape, device="meta").stride()
    kind = _Early if transformed or torch.compiler.is_exporting() else QTensor
    made: QTensor = torch.Tensor._make_wrapper_subclass(
        kind, shape, strides, offset, dtype=torch.float32, device=codes.device
    )
    made.codes, made.scale, made.zero_point, made.axis, made.stored_as = codes, scale, zero_point, axis, stored_as
    return made


_fake_mode = torch._C._get_dispatch_mode
_transform = torch._C._functorch.peek_interpreter_stack
_is_compiling, _context = torch.compiler.is_compiling, torch._guards.TracingContext.try_get
_jit_traces = torch._C._get_tracing_state


def is_traced() -> bool:
    """Whether a compiler, torch.export or torch.jit.trace looks on, so that what runs here becomes part of a graph."""
    return _is_compiling() or _context() is not None or _jit_traces() is not None


def _skip_when_compiled(function: Any) -> None:
    """Let torch.compile run a function as it is: it would lose what `wrap` writes into the object.

    What torch.compiler.disable does, without the seconds that its import takes; with
    torch.compiler.allow_in_graph(wrap) a graph goes on through it.
    """
    c = torch._C._dynamo.eval_frame
    c.set_code_exec_strategy(function.__code__, c._FrameExecStrategy(c._FrameAction.SKIP, c._FrameAction.DEFAULT))


def rebuild(*parts: Any) -> QTensor:
    """What a file holds of a QTensor -> the QTensor. Checked, since a file can hold anything."""
    return QTensor(*parts)


torch.serialization.add_safe_globals([rebuild])
_skip_when_compiled(wrap)


@contextmanager
def dequantizing() -> Iterator[None]:
    """Within this, an operator that has no form on integers gets real numbers and returns them, instead of an error."""
    token = _dequantizing.set(True)
    try:
        yield
    finally:
        _dequantizing.reset(token)


def _plain(part: Any) -> Any:
    """A number, or a tuple of them, to compare by value."""
    return (tuple(part.tolist()) if part.dim() else part.item()) if isinstance(part, Tensor) else part


def _check(
    codes: Tensor, scale: Any, zero_point: Any, axis: int | None, dtype: torch.dtype | None, width: int | None
) -> None:
    if codes.dtype not in NAMES:
        raise SpecError(f"codes are uint8, int8 or int32, got {codes.dtype}")
    if dtype not in (None, NAMES[codes.dtype]) and (dtype, codes.dtype) != (torch.quint4x2, torch.uint8):
        raise SpecError(f"codes of {codes.dtype} cannot be {dtype}; they are {NAMES[codes.dtype]}")
    if axis is None:
        check_one_scale(scale, zero_point)
        return
    if not 0 <= axis < codes.dim():
        raise SpecError(f"axis {axis} does not exist in codes of shape {tuple(codes.shape)}")
    sizes = [tuple(part.shape) if isinstance(part, Tensor) else None for part in (scale, zero_point)]
    packed = dtype is torch.quint4x2 and axis == codes.dim() - 1
    length = (width or 2 * codes.shape[axis]) if packed else codes.shape[axis]
    if sizes != [(length,), (length,)]:
        raise SpecError(
            f"scale and zero_point are tensors of {length} values, one for each index of dimension {axis} of codes of "
            f"shape {tuple(codes.shape)}; got {sizes}"
        )


def check_one_scale(scale: Any, zero_point: Any) -> None:
    """
    Raises:
        SpecError: these are no scale and zero point of a whole tensor.
    """
    several = [part for part in (scale, zero_point) if isinstance(part, Tensor) and part.numel() != 1]
    if several:
        raise SpecError(f"{several[0].numel()} scales or zero points need an axis; see quantize_per_channel")
    if not isinstance(scale, Tensor) and not 0 < scale < float("inf"):
        raise SpecError(f"scale is a positive number, got {scale}")
