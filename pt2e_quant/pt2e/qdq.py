"""The one place that writes quantize/dequantize pairs into a graph.

Dialect: torch.ops.quantized_decomposed, in the argument forms that ExecuTorch and Inductor match. A tensor is quantized
once and dequantized once per use: a dequantize with users in integer and in float cannot be fused by either, and
kernels want a dequantize of its own for each operand, also where one tensor is read twice (x + x).
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ..errors import ConversionError
from ..graph.attributes import free_name, insert_attribute
from ..graph.module import is_guard
from ..graph.values import copy_value, fake_like, set_value, with_value
from ..graph.write import Writer
from ..meta import TAG_KEY
from ..where import locate
from .observed import QParams

__all__ = ["PairWriter"]

_OPS = torch.ops.quantized_decomposed
_BY = "convert_pt2e"


class PairWriter:
    """Replaces the calls of observers in one graph by q/dq."""

    def __init__(self, gm: GraphModule) -> None:
        self._gm = gm
        self._write = Writer(gm, _BY)
        self._scales = free_name(gm, "_scale_")
        self._zero_points = free_name(gm, "_zero_point_")
        self._buffers: dict[int, tuple[str, str]] = {}

    def replace(self, observed: Node, qparams: QParams) -> None:
        """Put q, and one dq per use, in the place of the call `observed` of an observer on its first argument."""
        value = observed.args[0]
        if not isinstance(value, Node):
            raise ConversionError(f"an observer is called on {value!r}, which is not a tensor:\n{locate(observed)}")
        with self._write.before(observed):
            quantized, dequantize, arguments = self._quantize(value, observed, qparams)

        def dequantized(used: Node, at: Node) -> Node:
            if used is not observed:
                return used
            write, taken = self._write.without_value, (quantized, *arguments)
            with self._write.before(at):
                if _needs_float32(value, dequantize, qparams):
                    exact = self._call(dequantize, taken, torch.float32)
                    node = write(torch.ops.aten._to_copy.default, (exact,), {"dtype": _dtype_of(value)})
                else:
                    node = write(dequantize, taken, self._out_dtype(value, dequantize))
            return copy_value(node, value)

        for user in list(observed.users):
            if is_guard(user):
                user.replace_input_with(observed, value)
                continue
            at = user if value.op == "get_attr" else observed  # a run shall hold one weight in float, not all of them
            user.args, user.kwargs = map_arg((user.args, user.kwargs), functools.partial(dequantized, at=at))
        _tag(quantized, value)
        self._gm.graph.erase_node(observed)

    def _quantize(self, value: Node, like: Node, qparams: QParams) -> tuple[Node, Any, tuple[Any, ...]]:
        """The quantize node, and op and further arguments of the dequantize that undoes it."""
        if qparams.is_cast:
            cast = _OPS.convert_element_type.no_fuse
            half = self._call(cast, (value, qparams.dtype), qparams.dtype)
            return half, cast, (_dtype_of(value),)
        limits = (qparams.quant_min, qparams.quant_max, qparams.dtype)
        if qparams.scale is None:
            return self._dynamic(value, like, qparams, limits)
        if qparams.axis is not None or qparams.group_size is not None:
            return self._per_channel(value, like, qparams, limits)
        if qparams.scale.numel() != 1:
            raise ConversionError(
                f"an observer gave {qparams.scale.numel()} scales for a per-tensor scheme:\n{locate(like)}\n"
                "  Use a per-channel qscheme with ch_axis, or an observer with one scale."
            )
        arguments = (float(qparams.scale), int(qparams.zero_point), *limits)  # type: ignore[arg-type]
        quantized = self._call(_OPS.quantize_per_tensor.default, (value, *arguments), qparams.dtype)
        return quantized, _OPS.dequantize_per_tensor.default, arguments

    def _per_channel(
        self, value: Node, like: Node, qparams: QParams, limits: tuple[Any, ...]
    ) -> tuple[Node, Any, tuple[Any, ...]]:
        if id(qparams) not in self._buffers:
            self._buffers[id(qparams)] = next(self._scales), next(self._zero_points)
        float_zero_point = qparams.zero_point.dtype.is_floating_point  # type: ignore[union-attr]
        tensors = (
            qparams.scale.to(torch.float32).clone().contiguous(),  # type: ignore[union-attr]
            qparams.zero_point.to(torch.float32 if float_zero_point else torch.int64).clone().contiguous(),  # type: ignore[union-attr]
        )
        scale, zero_point = (
            insert_attribute(self._gm, name, tensor, like, _BY)
            for name, tensor in zip(self._buffers[id(qparams)], tensors, strict=True)
        )
        if qparams.group_size is not None:
            arguments: tuple[Any, ...] = (scale, zero_point, *limits, qparams.group_size)
            quantized = self._call(_OPS.quantize_per_channel_group.default, (value, *arguments), qparams.dtype)
            return quantized, _OPS.dequantize_per_channel_group.default, (*arguments, _dtype_of(value))
        arguments = (scale, zero_point, qparams.axis, *limits)
        quantized = self._call(_OPS.quantize_per_channel.default, (value, *arguments), qparams.dtype)
        return quantized, _OPS.dequantize_per_channel.default, arguments

    def _dynamic(
        self, value: Node, like: Node, qparams: QParams, limits: tuple[Any, ...]
    ) -> tuple[Node, Any, tuple[Any, ...]]:
        low, high, dtype = limits
        if qparams.per_token:
            if qparams.symmetric or (low, high, dtype) != (-128, 127, torch.int8):
                raise ConversionError(
                    f"per-token qparams exist for asymmetric schemes over all of torch.int8 only, not for {dtype}:\n"
                    f"{locate(like)}\n  Use torch.int8 and torch.per_tensor_affine without quant_min and quant_max."
                )
            choose = _OPS.choose_qparams_per_token_asymmetric.default
            arguments: tuple[Any, ...] = (value, dtype)
            quantize, dequantize = _OPS.quantize_per_token.default, _OPS.dequantize_per_token.default
        else:
            choose = _OPS.choose_qparams_symmetric.tensor if qparams.symmetric else _OPS.choose_qparams.tensor
            arguments = (value, low, high, qparams.eps, dtype)
            quantize, dequantize = _OPS.quantize_per_tensor.tensor, _OPS.dequantize_per_tensor.tensor
        chosen = self._call(choose, arguments)
        scale = self._call(operator.getitem, (chosen, 0))
        zero_point = self._call(operator.getitem, (chosen, 1))
        quantized = self._call(quantize, (value, scale, zero_point, *limits), dtype)
        out = (_dtype_of(value),) if qparams.per_token else ()
        return quantized, dequantize, (scale, zero_point, *limits, *out)

    def _call(self, target: Any, args: tuple[Any, ...], dtype: torch.dtype | None = None) -> Node:
        node = self._write.without_value(target, args, {})
        source: Node = args[0]
        if dtype is not None:
            value: Any = source.meta.get("val")
            mode = getattr(value, "fake_mode", None)
            if mode is not None:
                set_value(node, fake_like(value, mode, dtype))
        elif target is operator.getitem:
            with_value(node, source, lambda: source.meta["val"][args[1]])
        else:
            values = [a.meta.get("val") if isinstance(a, Node) else a for a in args]
            with_value(node, source, lambda: target(*values))
        return node

    @staticmethod
    def _out_dtype(value: Node, dequantize: Any) -> dict[str, Any]:
        """Models in half precision get their own dtype back; per token and group, it is a positional argument."""
        dtype = _dtype_of(value)
        if dtype is torch.float32 or dequantize in (
            _OPS.convert_element_type.no_fuse,
            _OPS.dequantize_per_channel_group.default,
            _OPS.dequantize_per_token.default,
        ):
            return {}
        return {"out_dtype": dtype}


def _tag(quantized: Node, value: Node) -> None:
    """A dequantize belongs to the part of the model that reads it; a quantize to that which computes the value.

    With qparams at run time, or where nobody tagged that, the quantize belongs to its first tagged reader, too.
    """
    tags = []
    for dequantized in quantized.users:
        of_readers = [user.meta[TAG_KEY] for user in dequantized.users if TAG_KEY in user.meta]
        if of_readers:
            dequantized.meta[TAG_KEY] = of_readers[0]
            tags.append(of_readers[0])
    chosen = [node for node in quantized.all_input_nodes if node.target is operator.getitem and node is not value]
    if TAG_KEY in value.meta and not chosen:
        tags = [value.meta[TAG_KEY]]
    for node in (quantized, *chosen, *(node.args[0] for node in chosen)) if tags else ():
        node.meta[TAG_KEY] = tags[0]  # type: ignore[union-attr]  # getitem takes a node apart


def _needs_float32(value: Node, dequantize: Any, qparams: QParams) -> bool:
    """The ops per tensor subtract the zero point in the dtype that they return: float16 of int16 would be infinite."""
    dtype = _dtype_of(value)
    if dtype is torch.float32:
        return False
    per_tensor = dequantize in (_OPS.dequantize_per_tensor.default, _OPS.dequantize_per_tensor.tensor)
    return per_tensor and qparams.quant_max - qparams.quant_min > 2 / torch.finfo(dtype).eps


def _dtype_of(value: Node) -> torch.dtype:
    return getattr(value.meta.get("val"), "dtype", torch.float32)
