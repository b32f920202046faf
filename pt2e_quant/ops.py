"""What we know of ATen ops, in one table; and the registration of the q/dq ops, in one place.

A row of the table says what an op is (its family) and what quantization may rely on (its traits). In-place and `_copy`
twins are not written down: they are found in torch by schema and share the row of their functional form. What the
schema of a single op says of its arguments, `arguments` tells.

Patterns, passes and backends ask here instead of keeping lists of ops.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Node

from . import _quantized_decomposed
from .arguments import bind
from .errors import QuantizationError, TargetingError
from .reasons import because

__all__ = [
    "ADAPTIVE_AVG_POOL", "ADAPTIVE_MAX_POOL", "ADD", "ATTENTION", "AVG_POOL", "BATCH_NORM", "CAST", "CAT",
    "CHOOSE_QPARAMS", "CLAMP", "COMPOSITE", "CONV", "CONV1D", "CONV2D", "CONV3D", "CONVOLUTION", "CONV_TRANSPOSE",
    "CONV_TRANSPOSE1D", "CONV_TRANSPOSE2D", "CONV_TRANSPOSE3D", "COPY", "DEQUANTIZE", "DIV", "DROPOUT", "EMBEDDING",
    "EMBEDDING_BAG", "EXPAND", "HARDTANH", "LEAKY_RELU", "LINEAR", "LOG", "MAGNITUDE", "MATMUL", "MAX_POOL", "MEAN",
    "MM", "MUL", "PAD", "PERMUTE", "PRODUCTS", "QUANTIZE", "RECIPROCAL", "RELU", "RELU6", "RELUS", "RESHAPE", "RNN",
    "RNN_CELL", "SLICE", "SOFTMAX", "SPLIT", "SQRT", "SQUEEZE", "SUB", "SUM", "UNBIND", "UPSAMPLE_NEAREST",
    "dynamic_ceiling", "factors", "fills_zeros", "functional", "has_hidden_alias", "is_call", "is_commutative",
    "is_conv", "is_conv_transpose", "is_dequantize", "is_elementwise", "is_quantize", "is_value_preserving", "known",
    "memory_of", "op_name", "pads_zeros", "register_quantized_decomposed", "resolve", "twins",
]  # fmt: skip


# --- the q/dq ops -----------------------------------------------------------------------------------------------------


def register_quantized_decomposed() -> None:
    """Make torch.ops.quantized_decomposed complete: from torch.ao where torch has it, otherwise from our own code.

    Runs on import of this module. Doing it again changes nothing. Ops that others have registered stay theirs, but for
    the kernels that fail on empty tensors.
    """
    if _quantized_decomposed.missing():
        _register_from_torch_ao()
        _quantized_decomposed.register()
    _quantized_decomposed.take_empty_tensors()


def _register_from_torch_ao() -> None:
    # torch.ao announces its end, to people who can do nothing about this import. An ImportError says that it is gone;
    # a RuntimeError, that somebody defined one of the ops before, which ends torch.ao's file half-way.
    with warnings.catch_warnings(), contextlib.suppress(ImportError, RuntimeError):
        warnings.simplefilter("ignore")
        import torch.ao.quantization.fx._decomposed  # noqa: F401


# --- twins ------------------------------------------------------------------------------------------------------------


@functools.cache
def twins(op: OpOverload) -> frozenset[OpOverload]:
    """The op with its functional, in-place and _copy forms: twins(add_.Tensor) is {add.Tensor, add_.Tensor}."""
    base = functional(op)
    forms = (_form(base, _plain_name(base) + suffix) for suffix in ("_", "_copy"))
    return frozenset({base, *(form for form in forms if form is not None)})


@functools.cache
def functional(op: OpOverload) -> OpOverload:
    """The form that `op` is a twin of: add.Tensor for add_.Tensor, view.default for view_copy.default, or op itself."""
    name = _plain_name(op)
    for suffix in ("_copy", "_"):
        base = _form(op, name.removesuffix(suffix)) if name.endswith(suffix) else None
        if base is not None:
            return base
    return op


def _form(op: OpOverload, name: str) -> OpOverload | None:
    """The overload of the op `name` that takes the same arguments as `op`.

    Names of overloads say nothing (transpose.int, transpose_.default), nor does the name of the first argument
    (dropout(input, ...), dropout_(self, ...)).
    """
    packet = getattr(getattr(torch.ops, op.namespace), name, None)
    if not isinstance(packet, OpOverloadPacket):
        return None
    overloads = packet.overloads()
    if op._overloadname in overloads:  # most often this one, so it is tried first
        overloads = [op._overloadname, *overloads]
    wanted = _shape_of_arguments(op)
    return next((found for o in overloads if _shape_of_arguments(found := getattr(packet, o)) == wanted), None)


def _shape_of_arguments(op: OpOverload) -> list[tuple[str, str, bool]]:
    arguments = enumerate(op._schema.arguments)
    return [(argument.name if i else "", str(argument.type), argument.kwarg_only) for i, argument in arguments]


def _plain_name(op: OpOverload) -> str:
    return str(op._schema.name).rpartition("::")[2]


# --- the table --------------------------------------------------------------------------------------------------------

Condition = Callable[[Node], bool]


def _always(node: Node) -> bool:
    return True


def _in_inference(node: Node) -> bool:
    return bind(node)["train"] is False


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and value == 0


def _zero(name: str) -> Condition:
    """The argument `name` is the number 0, or left out where that means 0."""
    return lambda node: _is_zero(bind(node)[name] or 0)


def _overwrites(node: Node) -> bool:
    return bind(node)["accumulate"] is False


def _unit_alpha(node: Node) -> bool:
    return bool(bind(node)["alpha"] == 1)


def _keeps_dtype(node: Node) -> bool:
    """All operands have the dtype of the result; False where the graph does not record dtypes."""
    dtypes = {getattr(of.meta.get("val"), "dtype", None) for of in (node, *node.all_input_nodes)}
    return len(dtypes) == 1 and None not in dtypes


@dataclass(frozen=True)
class _Traits:
    """What holds for the ops of a row; a Condition other than `_always` says for which arguments.

    preserves: each value of the output is a value of a float input, picked by place or by order, or a zero that fills.
               Integers can be picked likewise: op(quantize(x)) is quantize(op(x)), input and output share one scale
    fills:     of those that preserve values: zeros may stand in the output that are no values of the input
    commutes:  the first two operands may change places
    aliases:   the result can lie in the memory of the first operand, although the schema does not say so
    """

    preserves: Condition | None = None
    fills: Condition | None = None
    commutes: Condition | None = None
    aliases: Condition | None = None


_TRAITS: dict[OpOverload, _Traits] = {}
_absent: list[str] = []  # named below, but not in this torch


def _row(names: str, **traits: Condition) -> tuple[OpOverload, ...]:
    """Enter ops into the table, with their twins; those of them that this torch has.

    Args:
        names: 'name.overload' of each functional form, of the namespace aten unless another stands before '::'.
        traits: the fields of _Traits.
    """
    ops = dict.fromkeys(_overloads(names))
    if not _TRAITS.keys().isdisjoint(ops):
        raise QuantizationError(f"an op stands in two rows: {_TRAITS.keys() & ops.keys()}")
    _TRAITS.update(dict.fromkeys(ops, _Traits(**traits)))
    return tuple(ops)


def _overloads(names: str) -> Iterator[OpOverload]:
    for entry in names.split():
        namespace, _, name = entry.rpartition("::")
        packet, _, overload = name.partition(".")
        found = getattr(getattr(getattr(torch.ops, namespace or "aten"), packet, None), overload, None)
        if found is None:
            _absent.append(entry)
        else:
            yield from (found, *sorted(twins(found), key=str))


register_quantized_decomposed()

# Arithmetic
CONV1D = _row("conv1d.default conv1d.padding")
CONV2D = _row("conv2d.default conv2d.padding")
CONV3D = _row("conv3d.default conv3d.padding")
CONV = (*CONV1D, *CONV2D, *CONV3D)
CONV_TRANSPOSE1D = _row("conv_transpose1d.default")
CONV_TRANSPOSE2D = _row("conv_transpose2d.input")
CONV_TRANSPOSE3D = _row("conv_transpose3d.input")
CONV_TRANSPOSE = (*CONV_TRANSPOSE1D, *CONV_TRANSPOSE2D, *CONV_TRANSPOSE3D)
CONVOLUTION = _row("convolution.default _convolution.default convolution_overrideable.default")
LINEAR = _row("linear.default")
PRODUCTS = frozenset((*CONV, *CONV_TRANSPOSE, *CONVOLUTION, *LINEAR))
"""Linears and convolutions, transposed ones too: what is made to have a weight."""
MM = _row("mm.default matmul.default addmm.default")
MATMUL = (*MM, *_row("bmm.default baddbmm.default"))
ATTENTION = _row("scaled_dot_product_attention.default")
RNN_CELL = _row("lstm_cell.default gru_cell.default rnn_tanh_cell.default rnn_relu_cell.default")
RNN = _row("lstm.input lstm.data gru.input gru.data rnn_tanh.input rnn_tanh.data rnn_relu.input rnn_relu.data")
COMPOSITE = _row(
    "softplus.default mish.default hardshrink.default softshrink.default celu.default lerp.Scalar lerp.Tensor "
    "cosine_similarity.default"
)
EMBEDDING_BAG = _row("embedding_bag.default embedding_bag.padding_idx")
EMBEDDING = (*_row("embedding.default"), *EMBEDDING_BAG)
BATCH_NORM = _row(
    "batch_norm.default native_batch_norm.default cudnn_batch_norm.default miopen_batch_norm.default "
    "_batch_norm_impl_index.default _batch_norm_no_update.default _batch_norm_with_update.default "
    "_batch_norm_with_update_functional.default _native_batch_norm_legit.default _native_batch_norm_legit.no_stats "
    "_native_batch_norm_legit_functional.default _native_batch_norm_legit_no_training.default"
)
NORM = _row("layer_norm.default rms_norm.default group_norm.default instance_norm.default")
ADD = _row("add.Tensor", commutes=_unit_alpha)
SUB = _row("sub.Tensor subtract.Tensor")
MUL = _row("mul.Tensor multiply.Tensor", commutes=_always)
DIV = _row("div.Tensor divide.Tensor true_divide.Tensor")
MEAN = _row("mean.default mean.dim")
SUM = _row("sum.default sum.dim_IntList")
POW = _row("pow.Tensor_Scalar")
SQRT = _row("sqrt.default")
MAGNITUDE = _row("abs.default square.default")
LOG = _row("log.default log2.default log10.default")
RECIPROCAL = _row("reciprocal.default rsqrt.default")
AVG_POOL = _row("avg_pool1d.default avg_pool2d.default avg_pool3d.default")
ADAPTIVE_AVG_POOL = _row(
    "adaptive_avg_pool1d.default adaptive_avg_pool2d.default adaptive_avg_pool3d.default "
    "_adaptive_avg_pool2d.default _adaptive_avg_pool3d.default"
)
_row(
    "eq.Tensor ne.Tensor logical_and.default logical_or.default logical_xor.default bitwise_and.Tensor "
    "bitwise_or.Tensor bitwise_xor.Tensor logaddexp.default logaddexp2.default hypot.default",
    commutes=_always,
)

_UNTAGGED = _row(
    "hardswish.default log_sigmoid.default prelu.default"
)  # elementwise, though torch does not tag them so

# Clamps
RELU = _row("relu.default")
RELU6 = _row("relu6.default")
LEAKY_RELU = _row("leaky_relu.default")
HARDTANH = _row("hardtanh.default")
RELUS = (*RELU, *RELU6, *HARDTANH)
SOFTMAX = _row("softmax.int _softmax.default")
CLAMP = _row("clamp.default clip.default clamp_min.default clamp_max.default")

# Same values in another shape or place
RESHAPE = _row(
    "view.default view_as.default reshape.default reshape_as.default flatten.using_ints ravel.default unflatten.int",
    preserves=_always,
)
RESHAPE += _row("_unsafe_view.default", preserves=_always, aliases=_always)
SQUEEZE = _row("unsqueeze.default squeeze.default squeeze.dim squeeze.dims", preserves=_always)
PERMUTE = _row(
    "permute.default transpose.int swapaxes.default swapdims.default movedim.int movedim.intlist moveaxis.int "
    "moveaxis.intlist t.default numpy_T.default mT.default",
    preserves=_always,
)
COPY = _row(
    "alias.default clone.default contiguous.default detach.default lift_fresh.default",
    preserves=_always,
)
_row(
    "_reshape_alias.default _reshape_copy.default mH.default matrix_H.default adjoint.default flip.default "
    "fliplr.default flipud.default roll.default rot90.default pixel_shuffle.default pixel_unshuffle.default "
    "channel_shuffle.default native_channel_shuffle.default positive.default conj.default resolve_conj.default "
    "resolve_neg.default",
    preserves=_always,
)
_row(
    "atleast_1d.default atleast_2d.default atleast_3d.default lift.default",
    preserves=_always,
    aliases=_always,
)

# A part of the values, or some of them several times
SLICE = _row("slice.Tensor select.int narrow.default", preserves=_always)
EXPAND = _row("expand.default expand_as.default broadcast_to.default", preserves=_always)
_row(
    "narrow.Tensor index_select.default gather.default index.Tensor "
    "_unsafe_index.Tensor take.default take_along_dim.default masked_select.default unfold.default "
    "as_strided.default diagonal.default linalg_diagonal.default "
    "broadcast_tensors.default repeat.default tile.default repeat_interleave.self_int "
    "repeat_interleave.self_Tensor meshgrid.default meshgrid.indexing hsplit.int hsplit.array "
    "vsplit.int vsplit.array dsplit.int dsplit.array",
    preserves=_always,
)
SPLIT = _row(
    "split.Tensor split.sizes split_with_sizes.default chunk.default tensor_split.sections tensor_split.indices "
    "tensor_split.tensor_indices_or_sections",
    preserves=_always,
)
UNBIND = _row("unbind.int", preserves=_always)
_row("diag.default diag_embed.default tril.default triu.default im2col.default", preserves=_always, fills=_always)
_row(
    "unsafe_split.Tensor unsafe_split_with_sizes.default unsafe_chunk.default",
    preserves=_always,
    aliases=_always,
)
UPSAMPLE_NEAREST = _row(
    "upsample_nearest1d.default upsample_nearest2d.default upsample_nearest3d.default upsample_nearest1d.vec "
    "upsample_nearest2d.vec upsample_nearest3d.vec _upsample_nearest_exact1d.default "
    "_upsample_nearest_exact2d.default _upsample_nearest_exact3d.default _upsample_nearest_exact1d.vec "
    "_upsample_nearest_exact2d.vec _upsample_nearest_exact3d.vec",
    preserves=_always,
)
_row(
    "reflection_pad1d.default reflection_pad2d.default reflection_pad3d.default replication_pad1d.default "
    "replication_pad2d.default replication_pad3d.default _pad_circular.default",
    preserves=_always,
)

# Values of several tensors
CAT = _row("cat.default concat.default concatenate.default", preserves=_always)
STACK = _row(
    "stack.default hstack.default vstack.default row_stack.default dstack.default column_stack.default",
    preserves=_always,
)
_row(
    "where.self slice_scatter.default select_scatter.default diagonal_scatter.default "
    "as_strided_scatter.default index_copy.default scatter.src masked_scatter.default",
    preserves=_always,
)

_row("block_diag.default", preserves=_always, fills=_always)

# The largest or smallest values: rounding to a grid does not change their order
_row(
    "maximum.default minimum.default fmax.default fmin.default max.other min.other",
    preserves=_always,
    commutes=_always,
)
MAX_POOL = _row("max_pool1d.default max_pool2d.default max_pool3d.default", preserves=_always)
_row(
    "max_pool1d_with_indices.default max_pool2d_with_indices.default max_pool3d_with_indices.default",
    preserves=_always,
)
ADAPTIVE_MAX_POOL = _row(
    "adaptive_max_pool1d.default adaptive_max_pool2d.default adaptive_max_pool3d.default",
    preserves=_always,
)
_row(
    "amax.default amin.default aminmax.default max.default min.default max.dim min.dim cummax.default "
    "cummin.default sort.default sort.stable msort.default topk.default kthvalue.default median.default median.dim",
    preserves=_always,
)

# Value-preserving for some arguments
PAD = _row(
    "pad.default constant_pad_nd.default", preserves=_zero("value"), fills=_always
)  # modes that repeat take no value
_row("masked_fill.Scalar index_fill.int_Scalar", preserves=_zero("value"), fills=_always)
_row("where.ScalarOther", preserves=_zero("other"), fills=_always)
_row("where.ScalarSelf", preserves=_zero("self"), fills=_always)
_row("index_put.default _unsafe_index_put.default", preserves=_overwrites)
CAST = _row("to.device to.dtype to.other to.dtype_layout _to_copy.default", preserves=_keeps_dtype)
CAST += _row("type_as.default", preserves=_keeps_dtype, aliases=_keeps_dtype)
_row("copy.default", preserves=_keeps_dtype)
DROPOUT = _row(
    "dropout.default feature_dropout.default alpha_dropout.default feature_alpha_dropout.default "
    "native_dropout.default",
    preserves=_in_inference,
    aliases=_in_inference,
)

# From real numbers to integers and back
QUANTIZE = _row(
    "quantized_decomposed::quantize_per_tensor.default quantized_decomposed::quantize_per_tensor.tensor "
    "quantized_decomposed::quantize_per_tensor.tensor2 quantized_decomposed::quantize_per_channel.default "
    "quantized_decomposed::quantize_per_token.default quantized_decomposed::quantize_per_channel_group.default"
)
DEQUANTIZE = _row(
    "quantized_decomposed::dequantize_per_tensor.default quantized_decomposed::dequantize_per_tensor.tensor "
    "quantized_decomposed::dequantize_per_tensor.tensor2 quantized_decomposed::dequantize_per_channel.default "
    "quantized_decomposed::dequantize_per_token.default quantized_decomposed::dequantize_per_channel_group.default"
)
CHOOSE_QPARAMS = _row(
    "quantized_decomposed::choose_qparams.tensor quantized_decomposed::choose_qparams_symmetric.tensor "
    "quantized_decomposed::choose_qparams_per_token.default "
    "quantized_decomposed::choose_qparams_per_token_asymmetric.default"
)


# --- look-ups ---------------------------------------------------------------------------------------------------------


def known() -> frozenset[OpOverload]:
    """Every op of the table, twins included."""
    return frozenset(_TRAITS)


def is_value_preserving(op: object) -> bool:
    """Whether quantizing commutes with `op`, so that input and output can share one scale.

    True when each value of the output is one of the input, or a zero that fills. Of an op with several results (topk),
    this means the floating-point ones; of an op with index or mask operands (gather), it means the others.

    Args:
        op: an OpOverload: can it be, for some arguments? A Node: is it, with the arguments that it has (a dropout in
            training, a pad with ones, and a cast to another dtype are not)? Anything else: False.
    """
    return _holds("preserves", op)


def fills_zeros(op: object) -> bool:
    """Whether a value-preserving op may put zeros into its output as well (a pad, tril); among codes, zero points."""
    return _holds("fills", op)


def pads_zeros(node: Node) -> bool:
    """Whether a node is a pad that fills with zeros; where its amounts are negative, it crops as well."""
    if node.target not in PAD:
        return False
    bound = bind(node)
    return bound.get("mode", "constant") == "constant" and _is_zero(bound["value"] or 0)


def dynamic_ceiling(sizes: Sequence[Any], ceil_mode: bool) -> str | None:
    """Why no backend pools in integers: sizes that are only known at run time would be rounded up."""
    fixed = all(isinstance(size, int) for size in sizes)
    return because("dynamic_shape", "ceil_mode with dynamic shapes") if ceil_mode and not fixed else None


def is_elementwise(node: Node) -> bool:
    """Whether each value of a node is computed from the values at its place in the operands, broadcast to one shape."""
    op = node.target
    return isinstance(op, OpOverload) and (op in _UNTAGGED or torch.Tag.pointwise in functional(op).tags)


def is_commutative(op: object) -> bool:
    """Whether the first two operands may change places; of an OpOverload or a Node, as in `is_value_preserving`."""
    return _holds("commutes", op)


def has_hidden_alias(node: Node) -> bool:
    """Whether the result can lie in the memory of the first operand, although the schema does not say so.

    A dropout in inference returns its input itself; what the schema does say, `alias_info` of its returns tells.
    """
    return _holds("aliases", node)


def memory_of(node: Node) -> Node | None:
    """The argument in whose memory the result of a view or an in-place op lies; None for results of their own."""
    if node.target is operator.getitem or has_hidden_alias(node):  # getitem: one of the views that split returns
        return node.args[0]  # type: ignore[return-value]
    if not isinstance(node.target, OpOverload) or not any(out.alias_info for out in node.target._schema.returns):
        return None
    arguments = node.target._schema.arguments
    given = [*node.args, *(node.kwargs.get(said.name) for said in arguments[len(node.args) :])]  # out= comes by name
    first = next((value for value, said in zip(given, arguments, strict=False) if said.alias_info), None)
    return first if isinstance(first, Node) else None


def factors(node: Node) -> tuple[Any, Any, Any]:
    """(input, weight, bias) of a convolution or matrix product; None for what its schema has not."""
    bound = bind(node)
    if "mat1" in bound:  # addmm
        return bound["mat1"], bound["mat2"], bound["self"]
    weight = next((bound[name] for name in ("weight", "mat2", "other") if name in bound), None)
    return bound.get("input", bound.get("self")), weight, bound.get("bias")


def is_conv(node: Node) -> bool:
    """Whether a node is a convolution that is not transposed, in any of its forms."""
    return node.target in CONV or (node.target in CONVOLUTION and not bind(node)["transposed"])


def is_conv_transpose(node: Node) -> bool:
    """Whether a node is a transposed convolution, in any of its forms."""
    return node.target in CONV_TRANSPOSE or (node.target in CONVOLUTION and bool(bind(node)["transposed"]))


def _holds(trait: str, op: object) -> bool:
    target = op.target if isinstance(op, Node) else op
    traits = _TRAITS.get(target) if isinstance(target, OpOverload) else None
    condition: Condition | None = getattr(traits, trait, None)
    return condition is not None and (not isinstance(op, Node) or condition(op))


def resolve(op: OpOverload | OpOverloadPacket) -> frozenset[OpOverload]:
    """What a user means by an op: an overload stands for itself and its twins, a packet (aten.add) for all overloads.

    Raises:
        TargetingError: `op` is neither.
    """
    if isinstance(op, OpOverload):
        return twins(op)
    if isinstance(op, OpOverloadPacket):
        return frozenset(twin for name in op.overloads() for twin in twins(getattr(op, name)))
    raise TargetingError(
        f"{op!r} is not an operator: pass an overload such as torch.ops.aten.add.Tensor, "
        "or a packet such as torch.ops.aten.add, which means all of its overloads"
    )


_QUANTIZE = frozenset(QUANTIZE)


_DEQUANTIZE = frozenset(DEQUANTIZE)


def is_call(node: object) -> bool:
    return isinstance(node, Node) and node.op == "call_function"


def is_quantize(node: object) -> bool:
    return isinstance(node, Node) and node.target in _QUANTIZE


def is_dequantize(node: object) -> bool:
    return isinstance(node, Node) and node.target in _DEQUANTIZE


def op_name(node: Node) -> str:
    """'conv2d' of aten.conv2d.default; in-place and _copy twins have the name of their functional form."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return str(getattr(target, "__name__", target))
    return functional(target)._schema.name.partition("::")[2]
