"""The op table against torch itself: every row is run, and torch's own schemas say what is missing."""

from __future__ import annotations

import operator
import random
import re
from typing import Any

import pytest
import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves, tree_map

from pt2e_quant import arguments, ops
from pt2e_quant.errors import CaptureError, QuantizationError, TargetingError

aten = torch.ops.aten


def all_of_aten() -> list[OpOverload]:
    names = sorted({s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("aten::")})
    packets = [getattr(aten, name.removeprefix("aten::")) for name in names]
    return [getattr(packet, overload) for packet in packets for overload in packet.overloads()]


def call(op: OpOverload, *args: Any, **kwargs: Any) -> Node:
    """A node of a fresh graph that calls `op`; tensors become placeholders with their value as meta["val"]."""
    graph = Graph()

    def placeholder(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        node = graph.placeholder("x")
        node.meta["val"] = value
        return node

    node = graph.call_function(op, tree_map(placeholder, args), tree_map(placeholder, kwargs))
    node.meta["val"] = op(*tree_map(copied, args), **tree_map(copied, kwargs))
    return node


def op_only(parameter: Any) -> str:
    """A short name of a test that has an op and its arguments as parameters."""
    return str(parameter) if isinstance(parameter, OpOverload) else ""


def copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


# --- twins ------------------------------------------------------------------------------------------------------------


def signature(op: OpOverload) -> str:
    """The arguments as torch prints them, without aliases and without the name of the first one."""
    text = re.sub(r"\([a-z](\|[a-z])*!?( -> \*)?\)", "", str(op._schema).partition("(")[2].rpartition(") ->")[0])
    kind, _, rest = text.partition(" ")
    return kind + rest.partition(",")[2]


def missing_twins(table: frozenset[OpOverload]) -> set[str]:
    """Ops of aten that are the functional, in-place or _copy form of an op in `table`, and are not in it."""
    forms = {(op._schema.name, signature(op)) for op in table}
    found = set()
    for op in all_of_aten():
        name = op._schema.name
        relatives = {name + "_", name + "_copy", name.removesuffix("_"), name.removesuffix("_copy")} - {name}
        relatives |= {
            base + other for base, other in ((name.removesuffix("_"), "_copy"), (name.removesuffix("_copy"), "_"))
        }
        if op not in table and any((relative, signature(op)) in forms for relative in relatives - {name}):
            found.add(str(op))
    return found


def test_the_table_misses_no_twin_that_aten_has():
    assert missing_twins(ops.known()) == set()


@pytest.mark.parametrize(
    "hole",
    ["add.Tensor", "add_.Tensor", "view_copy.default", "dropout_.default", "transpose_.default", "squeeze_copy.dims"],
)
def test_the_search_for_twins_finds_a_hole(hole):
    packet, overload = hole.split(".")
    assert missing_twins(ops.known() - {getattr(getattr(aten, packet), overload)}) == {f"aten.{hole}"}


@pytest.mark.parametrize(
    "family",
    [
        {aten.add.Tensor, aten.add_.Tensor},
        {aten.view.default, aten.view_copy.default},
        {aten.dropout.default, aten.dropout_.default},
        {aten.transpose.int, aten.transpose_.default, aten.transpose_copy.int},
        {aten.squeeze.dim, aten.squeeze_.dim, aten.squeeze_copy.dim},
        {aten.silu.default, aten.silu_.default},  # not in the table: twins are a matter of schemas
        {aten.pow.Tensor_Scalar, aten.pow_.Scalar},  # pow.Scalar(Scalar, Tensor) has the same name and is no twin
        {aten.pow.Scalar},
        {aten.linear.default},
        {aten.add.out},
        {aten.index_copy.default, aten.index_copy_.default},  # a name that ends in _copy by accident
        {torch.ops.quantized_decomposed.quantize_per_tensor.default},
    ],
    ids=lambda family: min(map(str, family)),
)
def test_every_member_of_a_twin_family_names_the_whole_family(family):
    for op in family:
        assert ops.twins(op) == family


def test_the_functional_form_is_the_one_that_writes_nothing_and_copies_nothing():
    assert ops.functional(aten.add_.Tensor) is aten.add.Tensor
    assert ops.functional(aten.squeeze_copy.dim) is aten.squeeze.dim
    assert ops.functional(aten.relu.default) is aten.relu.default


# --- the table --------------------------------------------------------------------------------------------------------


def test_this_torch_has_every_op_that_the_table_names():
    assert ops._absent == []


def test_an_op_that_this_torch_lacks_is_left_out():
    assert ops._row("no_such_op.default") == ()
    assert ops._absent.pop() == "no_such_op.default"


def test_an_op_cannot_stand_in_two_rows():
    with pytest.raises(QuantizationError, match=r"two rows.*aten\.add_"):
        ops._row("add_.Tensor")


def test_families_are_tuples_of_overloads_with_their_twins():
    for name in ops.__all__:
        if name.isupper():
            members = getattr(ops, name)
            assert members
            assert all(isinstance(op, OpOverload) for op in members)
            assert {twin for op in members for twin in ops.twins(op)} == set(members)
    assert list(ops.RELU) == [aten.relu.default, aten.relu_.default]
    assert ops.CONV_TRANSPOSE[1] is aten.conv_transpose2d.input


def x() -> torch.Tensor:
    """2 x 4 x 6 x 6 different values, some beyond the range of the grid below."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 6, 6, generator=generator) * 12


def y() -> torch.Tensor:
    return x().flip(0) + 0.3


def matrix() -> torch.Tensor:
    return x()[0, 0]


def index(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def mask() -> torch.Tensor:
    return x() > 0


OTHER_IDENTITIES = "alias clone contiguous detach lift lift_fresh positive conj resolve_conj resolve_neg"
SAMPLES: dict[str, tuple[Any, ...]] = {
    # positions
    "view.default": (x(), [8, 36]),
    "view_as.default": (x(), torch.empty(8, 36)),
    "reshape.default": (x(), [8, 36]),
    "reshape_as.default": (x(), torch.empty(8, 36)),
    "_unsafe_view.default": (x(), [8, 36]),
    "_reshape_alias.default": (x(), [8, 36], [36, 1]),
    "_reshape_copy.default": (x(), [8, 36]),
    "flatten.using_ints": (x(), 1),
    "ravel.default": (x(),),
    "unflatten.int": (x(), 1, [2, 2]),
    "unsqueeze.default": (x(), 1),
    "squeeze.default": (x()[:1],),
    "squeeze.dim": (x()[:1], 0),
    "squeeze.dims": (x()[:1], [0]),
    "atleast_1d.default": (matrix(),),
    "atleast_2d.default": (matrix(),),
    "atleast_3d.default": (matrix(),),
    "permute.default": (x(), [0, 2, 3, 1]),
    "transpose.int": (x(), 1, 2),
    "swapaxes.default": (x(), 1, 2),
    "swapdims.default": (x(), 1, 2),
    "movedim.int": (x(), 1, 2),
    "movedim.intlist": (x(), [1], [2]),
    "moveaxis.int": (x(), 1, 2),
    "moveaxis.intlist": (x(), [1], [2]),
    "t.default": (matrix(),),
    "numpy_T.default": (matrix(),),
    "mT.default": (x(),),
    "mH.default": (x(),),
    "matrix_H.default": (matrix(),),
    "adjoint.default": (x(),),
    "flip.default": (x(), [1]),
    "fliplr.default": (x(),),
    "flipud.default": (x(),),
    "roll.default": (x(), [1], [1]),
    "rot90.default": (x(), 1, [2, 3]),
    "pixel_shuffle.default": (x(), 2),
    "pixel_unshuffle.default": (x(), 2),
    "channel_shuffle.default": (x(), 2),
    "native_channel_shuffle.default": (x(), 2),
    **{f"{name}.default": (x(),) for name in OTHER_IDENTITIES.split()},
    # parts and repetitions
    "slice.Tensor": (x(), 1, 0, 4, 2),
    "select.int": (x(), 1, 0),
    "narrow.default": (x(), 1, 1, 2),
    "narrow.Tensor": (x(), 1, torch.tensor(1), 2),
    "index_select.default": (x(), 1, index(2, 0)),
    "gather.default": (x(), 0, torch.ones(1, 4, 6, 6, dtype=torch.int64)),
    "index.Tensor": (x(), [None, index(2, 0)]),
    "_unsafe_index.Tensor": (x(), [None, index(2, 0)]),
    "take.default": (x(), index(5, 7)),
    "take_along_dim.default": (x(), torch.ones(1, 4, 6, 6, dtype=torch.int64), 0),
    "masked_select.default": (x(), mask()),
    "unfold.default": (x(), 3, 3, 2),
    "as_strided.default": (x(), [3, 3], [7, 2]),
    "diagonal.default": (x(), 0, 2, 3),
    "linalg_diagonal.default": (x(),),
    "diag.default": (matrix()[0],),
    "diag_embed.default": (matrix(),),
    "tril.default": (x(),),
    "triu.default": (x(),),
    "im2col.default": (x(), [2, 2], [1, 1], [1, 1], [2, 2]),
    "expand.default": (x()[:1], [3, -1, -1, -1]),
    "expand_as.default": (x()[:1], x()),
    "broadcast_to.default": (x()[:1], [2, 4, 6, 6]),
    "broadcast_tensors.default": ([x(), y()[:1]],),
    "repeat.default": (x(), [1, 2, 1, 1]),
    "tile.default": (x(), [2]),
    "repeat_interleave.self_int": (x(), 2, 1),
    "repeat_interleave.self_Tensor": (x(), index(2, 1), 0),
    "meshgrid.default": ([matrix()[0], matrix()[1]],),
    "meshgrid.indexing": ([matrix()[0], matrix()[1]],),
    "split.Tensor": (x(), 2, 1),
    "split.sizes": (x(), [1, 3], 1),
    "split_with_sizes.default": (x(), [1, 3], 1),
    "chunk.default": (x(), 2, 1),
    "unbind.int": (x(), 1),
    "tensor_split.sections": (x(), 2, 1),
    "tensor_split.indices": (x(), [1], 1),
    "tensor_split.tensor_indices_or_sections": (x(), index(1), 1),
    "hsplit.int": (x(), 2),
    "hsplit.array": (x(), [1]),
    "vsplit.int": (x(), 2),
    "vsplit.array": (x(), [1]),
    "dsplit.int": (x(), 2),
    "dsplit.array": (x(), [1]),
    "unsafe_split.Tensor": (x(), 2, 1),
    "unsafe_split_with_sizes.default": (x(), [1, 3], 1),
    "unsafe_chunk.default": (x(), 2, 1),
    **{
        f"{name}{n}d.{overload}": ((matrix()[None], x(), x()[None])[n - 1], [9] * n, *rest)
        for name in ("upsample_nearest", "_upsample_nearest_exact")
        for n in (1, 2, 3)
        for overload, rest in (("default", ()), ("vec", (None,)))
    },
    **{
        f"{name}_pad{n}d.default": ((matrix()[None], x(), x()[None])[n - 1], [1] * 2 * n)
        for name in ("reflection", "replication")
        for n in (1, 2, 3)
    },
    "_pad_circular.default": (x(), [1, 1, 1, 1]),
    # several tensors
    "cat.default": ([x(), y()], 1),
    "concat.default": ([x(), y()], 1),
    "concatenate.default": ([x(), y()], 1),
    **{
        f"{name}.default": ([x(), y()],)
        for name in ("stack", "hstack", "vstack", "row_stack", "dstack", "column_stack")
    },
    "block_diag.default": ([matrix(), matrix() + 1],),
    "where.self": (mask(), x(), y()),
    "slice_scatter.default": (x(), y()[:, :2], 1, 0, 2),
    "select_scatter.default": (x(), y()[:, 0], 1, 0),
    "diagonal_scatter.default": (matrix(), y()[0, 0, 0]),
    "as_strided_scatter.default": (matrix(), y()[0, 0, :3, :3].contiguous(), [3, 3], [6, 1]),
    "index_copy.default": (x(), 1, index(0), y()[:, :1]),
    "scatter.src": (x(), 1, torch.zeros(2, 1, 6, 6, dtype=torch.int64), y()),
    "masked_scatter.default": (x(), mask(), y()),
    # order
    **{f"{name}.default": (x(), y()) for name in ("maximum", "minimum", "fmax", "fmin")},
    "max.other": (x(), y()),
    "min.other": (x(), y()),
    **{
        f"max_pool{n}d{kind}.default": ((matrix()[None], x(), x()[None])[n - 1], [2] * n, [1] * n, [1] * n)
        for n in (1, 2, 3)
        for kind in ("", "_with_indices")
    },
    **{f"adaptive_max_pool{n}d.default": ((matrix()[None], x(), x()[None])[n - 1], [2] * n) for n in (1, 2, 3)},
    "amax.default": (x(), [1]),
    "amin.default": (x(), [1]),
    "aminmax.default": (x(),),
    "max.default": (x(),),
    "min.default": (x(),),
    "max.dim": (x(), 1),
    "min.dim": (x(), 1),
    "cummax.default": (x(), 1),
    "cummin.default": (x(), 1),
    "sort.default": (x(), 1),
    "sort.stable": (x(),),
    "msort.default": (x(),),
    "topk.default": (x(), 2),
    "kthvalue.default": (x(), 2),
    "median.default": (x(),),
    "median.dim": (x(), 1),
    # under conditions, which are met here
    "pad.default": (x(), [1, 2]),
    "constant_pad_nd.default": (x(), [1, 2]),
    "masked_fill.Scalar": (x(), mask(), 0),
    "index_fill.int_Scalar": (x(), 1, index(0), 0.0),
    "where.ScalarOther": (mask(), x(), 0.0),
    "where.ScalarSelf": (mask(), 0, x()),
    "index_put.default": (x(), [index(0)], y()[:1]),
    "_unsafe_index_put.default": (x(), [index(0)], y()[:1]),
    "to.device": (x(), torch.device("cpu"), torch.float32),
    "to.dtype": (x(), torch.float32),
    "to.other": (x(), y()),
    "to.dtype_layout": (x(),),
    "type_as.default": (x(), y()),
    "_to_copy.default": (x(),),
    "copy.default": (x(), y()),
    **{
        f"{name}.default": (x(), 0.5, False)
        for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout")
    },
}
SHOULD_PRESERVE = sorted((op for op in ops.known() if ops.is_value_preserving(op)), key=str)


def sample(op: OpOverload) -> tuple[Any, ...]:
    return tree_map(copied, SAMPLES[str(ops.functional(op)).removeprefix("aten.")])


def keywords(op: OpOverload) -> dict[str, Any]:
    return {aten.sort.stable: {"stable": True}, aten.meshgrid.indexing: {"indexing": "xy"}}.get(op, {})


def on_grid(value: Any) -> Any:
    """Quantize and dequantize with scale 1/4 and zero point 3: a power of two, so that float32 is exact."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return ((value * 4).round() + 3).clamp(-128, 127).sub(3) / 4


def floats(values: Any) -> list[torch.Tensor]:
    return [v for v in tree_leaves(values) if isinstance(v, torch.Tensor) and v.is_floating_point()]


def values_of(tensors: list[torch.Tensor]) -> set[float]:
    return {value for tensor in tensors for value in tensor.flatten().tolist()}


def test_every_value_preserving_op_has_a_sample_and_no_sample_is_left_over():
    assert {str(ops.functional(op)).removeprefix("aten.") for op in SHOULD_PRESERVE} == set(SAMPLES)


@pytest.mark.parametrize("op", SHOULD_PRESERVE, ids=str)
def test_a_value_preserving_op_makes_no_new_values_and_commutes_with_quantization(op):
    args, kwargs = sample(op), keywords(op)
    assert ops.is_value_preserving(call(op, *args, **kwargs))
    plain = floats(op(*tree_map(copied, args), **kwargs))
    assert plain
    assert values_of(plain) <= values_of(floats(args)) | {0.0}
    inside = floats(op(*tree_map(on_grid, args), **kwargs))
    for outside, within in zip(plain, inside, strict=True):
        assert torch.equal(on_grid(outside), within)


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (aten.pad.default, (x(), [1, 2], "constant", 1.5)),
        (aten.constant_pad_nd.default, (x(), [1, 2], -1.5)),
        (aten.masked_fill.Scalar, (x(), mask(), float("-inf"))),
        (aten.index_fill_.int_Scalar, (x(), 1, index(0), 1.5)),
        (aten.where.ScalarOther, (mask(), x(), 1.5)),
        (aten.where.ScalarSelf, (mask(), 1.5, x())),
        (aten.index_put.default, (x(), [index(0)], y()[:1], True)),
        (aten._unsafe_index_put.default, (x(), [index(0)], y()[:1], True)),
        (aten.to.device, (x(), torch.device("cpu"), torch.float16)),
        (aten.to.dtype, (x(), torch.float16)),
        (aten.to.other, (x(), y().half())),
        (aten.type_as.default, (x(), y().half())),
        (aten.copy_.default, (x().half(), y())),
        (aten.dropout.default, (x(), 0.5, True)),
        (aten.native_dropout.default, (x(), 0.5, True)),
        (aten.dropout_.default, (x(), 0.5, True)),
        (aten.alpha_dropout.default, (x(), 0.5, True)),
        (aten.feature_dropout.default, (x(), 0.5, True)),
    ],
    ids=op_only,
)
def test_with_other_arguments_the_same_op_makes_new_values(op, args):
    assert ops.is_value_preserving(op)
    assert not ops.is_value_preserving(call(op, *args))
    made = values_of(floats(op(*tree_map(copied, args)))[:1])
    assert not made <= values_of(floats(args)[: 1 if op is not aten.copy_.default else 2]) | {0.0}


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_a_pad_that_repeats_the_tensor_preserves_its_values(mode):
    assert ops.is_value_preserving(call(aten.pad.default, x(), [1, 1, 1, 1], mode))


def test_a_cast_is_not_value_preserving_where_no_dtype_is_recorded():
    node = call(aten.to.dtype, x(), torch.float32)
    del node.args[0].meta["val"]
    assert not ops.is_value_preserving(node)
    del node.meta["val"]
    assert not ops.is_value_preserving(node)


NO_VIEW_OF_VALUES = {
    "other objects than dense tensors": "__getitem__ get keys values indices _indices _values ccol_indices col_indices "
    "crow_indices row_indices coalesce to_here local_value _unwrap_optional as_tensor _nested_get_values "
    "_nested_view_from_buffer _nested_view_from_jagged _sparse_broadcast_to",
    "TorchScript only": "select.t split.default to.prim_Device to.prim_dtype to.prim_other mH.a mT.a matrix_H.a "
    "numpy_T.a",
    "reads bits or numbers in another way": "view.dtype view_as_real view_as_complex real imag _neg_view _conj",
    "internal": "_fw_primal _make_dual _unpack_dual _ncf_unsqueeze _ncf_view _test_autograd_multiple_dispatch_view "
    "slice_inverse",
    "sums": "_grad_sum_to_size",
    "casts": "_autocast_to_full_precision _autocast_to_reduced_precision",
    "moves to another device, which export writes as to": "cpu cuda pin_memory",
}


def test_every_view_of_aten_is_in_the_table_or_has_a_reason_not_to_be():
    excused = {name for names in NO_VIEW_OF_VALUES.values() for name in names.split()}
    for op in all_of_aten():
        aliases = [a.alias_info for a in op._schema.returns if a.alias_info is not None]
        if aliases and not op._schema.is_mutable and not ops.is_value_preserving(op):
            full = str(op).removeprefix("aten.")
            assert {full, full.partition(".")[0]} & excused, op


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (aten.relu.default, ()),
        (aten.relu_.default, ()),
        (aten.relu6.default, ()),
        (aten.relu6_.default, ()),
        (aten.hardtanh.default, (-1.1, 2.3)),
        (aten.hardtanh_.default, ()),
        (aten.clamp.default, (-1.1, 2.3)),
        (aten.clamp_.default, (None, 2.3)),
        (aten.clip.default, (-1.1,)),
        (aten.clip_.default, (-1.1,)),
        (aten.clamp_min.default, (1.1,)),
        (aten.clamp_min_.default, (1.1,)),
        (aten.clamp_max.default, (1.1,)),
        (aten.clamp_max_.default, (1.1,)),
    ],
    ids=str,
)
def test_a_clamp_commutes_with_quantization_but_is_not_value_preserving(op, args):
    assert not ops.is_value_preserving(op)
    on_both_sides = on_grid(op(on_grid(x()), *args))
    assert torch.equal(on_grid(op(x(), *args)), on_both_sides)


@pytest.mark.parametrize("op", sorted((op for op in ops.known() if ops.is_commutative(op)), key=str), ids=str)
def test_the_operands_of_a_commutative_op_change_places(op):
    kind = torch.int64 if "bitwise" in str(op) else torch.float32
    left, right = (x() / 4).to(kind), (y() / 4).to(kind)
    assert ops.is_commutative(call(op, left, right))
    assert torch.equal(op(left.clone(), right.clone()), op(right.clone(), left.clone()))


def test_a_weighted_sum_is_not_commutative():
    assert ops.is_commutative(aten.add.Tensor)
    assert not ops.is_commutative(call(aten.add.Tensor, x(), y(), alpha=2))
    assert not ops.is_commutative(call(aten.add_.Tensor, x(), y(), alpha=2))
    assert not ops.is_commutative(aten.sub.Tensor)


@pytest.mark.parametrize("ask", [ops.is_value_preserving, ops.is_commutative])
def test_what_is_no_aten_op_has_no_traits(ask):
    node = Graph().call_function(operator.getitem, ((1, 2), 0))
    assert not ask(operator.getitem)
    assert not ask(node)
    assert not ask(aten.erf.default)


def test_convolutions_are_told_apart_by_their_argument():
    weight, pair, none = torch.randn(4, 4, 3, 3), [1, 1], [0, 0]
    plain = call(aten.convolution.default, x(), weight, None, pair, pair, pair, False, none, 1)
    transposed = call(aten.convolution.default, x(), weight, None, pair, pair, pair, True, none, 1)
    assert [ops.is_conv(plain), ops.is_conv_transpose(plain)] == [True, False]
    assert [ops.is_conv(transposed), ops.is_conv_transpose(transposed)] == [False, True]
    same = call(aten.conv2d.padding, x(), weight, None, pair, "same")
    assert [ops.is_conv(same), ops.is_conv_transpose(same)] == [True, False]
    up = call(aten.conv_transpose2d.input, x(), weight)
    assert [ops.is_conv(up), ops.is_conv_transpose(up)] == [False, True]
    assert not ops.is_conv(call(aten.relu.default, x()))


# --- selectors --------------------------------------------------------------------------------------------------------


def test_an_overload_means_itself_and_its_twins():
    assert ops.resolve(aten.add.Tensor) == {aten.add.Tensor, aten.add_.Tensor}


def test_a_packet_means_all_of_its_overloads_and_their_twins():
    assert ops.resolve(aten.add) >= {aten.add.Tensor, aten.add.Scalar, aten.add_.Tensor, aten.add_.Scalar}
    assert ops.resolve(aten.conv2d) == {aten.conv2d.default, aten.conv2d.padding}
    assert not ops.resolve(aten.conv2d) & ops.resolve(aten.conv1d)


@pytest.mark.parametrize("thing", [torch.add, "add", torch.nn.Linear, operator.add])
def test_anything_else_is_an_error_with_the_way_out(thing):
    with pytest.raises(TargetingError, match=r"pass an overload such as torch\.ops\.aten\.add\.Tensor"):
        ops.resolve(thing)


# --- arguments --------------------------------------------------------------------------------------------------------


def test_bind_names_arguments_and_fills_in_defaults_in_the_order_of_the_schema():
    node = call(aten.conv2d.default, x(), torch.randn(8, 2, 3, 3), groups=2)
    bound = arguments.bind(node)
    assert list(bound) == ["input", "weight", "bias", "stride", "padding", "dilation", "groups"]
    assert bound["input"] is node.args[0]
    assert [bound[name] for name in list(bound)[2:]] == [None, [1, 1], [0, 0], [1, 1], 2]


def test_bind_gives_enumerations_as_torch_spells_them():
    assert arguments.bind(call(aten.contiguous.default, x()))["memory_format"] is torch.contiguous_format
    assert arguments.bind(call(aten.clone.default, x()))["memory_format"] is None
    assert arguments.bind(call(aten.tril_indices.default, 3, 3))["dtype"] is torch.int64


def test_what_bind_returns_is_the_callers_to_change():
    node = call(aten.conv2d.default, x(), torch.randn(8, 4, 3, 3))
    arguments.bind(node).clear()
    with pytest.raises(TypeError, match="immutable"):
        arguments.bind(node)["stride"].append(3)
    assert arguments.bind(node)["stride"] == [1, 1]


@pytest.mark.parametrize("op", SHOULD_PRESERVE, ids=str)
def test_calling_with_what_bind_says_is_the_same_call(op):
    args, kwargs = sample(op), keywords(op)
    node = call(op, *args, **kwargs)
    bound = tree_map(lambda leaf: copied(leaf.meta["val"]) if isinstance(leaf, Node) else leaf, arguments.bind(node))
    by_place = [value for name, value in bound.items() if arguments.argument_index(op, name) is not None]
    by_name = {name: value for name, value in bound.items() if arguments.argument_index(op, name) is None}
    again = floats(op(*by_place, **by_name))
    for first, second in zip(floats(node.meta["val"]), again, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("args", "kwargs"), [((), {}), ((1, 2, 3), {}), ((1, 2), {"beta": 1}), ((1,), {"alpha": 2})], ids=str
)
def test_arguments_that_fit_no_schema_are_an_error_that_names_the_node(args, kwargs):
    node = Graph().call_function(aten.add.Tensor, args, kwargs)
    with pytest.raises(CaptureError, match=r"(?s)do not fit the schema aten::add\.Tensor.*node add_tensor"):
        arguments.bind(node)


def test_binding_a_call_without_schema_is_an_error_that_names_the_node():
    node = Graph().call_function(operator.getitem, ((1, 2), 0))
    with pytest.raises(CaptureError, match=r"(?s)which has a schema.*node getitem"):
        arguments.bind(node)


def test_argument_index_counts_positions():
    assert arguments.argument_index(aten.batch_norm.default, "training") == 5
    assert arguments.argument_index(aten.add.Tensor, "alpha") is None
    with pytest.raises(CaptureError, match="no argument 'train'; it takes input, weight, bias"):
        arguments.argument_index(aten.batch_norm.default, "train")


@pytest.mark.parametrize(
    ("args", "kwargs", "name", "value", "args_after", "kwargs_after"),
    [
        ((0.5, True), {}, "train", False, (0.5, False), {}),
        ((0.5,), {"train": True}, "train", False, (0.5,), {"train": False}),
        ((0.5, True), {}, "p", 0.25, (0.25, True), {}),
    ],
    ids=str,
)
def test_an_argument_keeps_its_form_when_it_is_set(args, kwargs, name, value, args_after, kwargs_after):
    node = Graph().call_function(aten.dropout.default, (None, *args), kwargs)
    assert arguments.set_argument(node, name, value)
    assert node.args == (None, *args_after)
    assert node.kwargs == kwargs_after
    assert not arguments.set_argument(node, name, value)


def test_an_argument_at_its_default_is_added_by_position():
    node = call(aten.conv2d.default, x(), torch.randn(8, 4, 3, 3))
    assert arguments.set_argument(node, "groups", 2)
    assert node.args[2:] == (None, [1, 1], [0, 0], [1, 1], 2)
    assert not node.kwargs
    assert not arguments.set_argument(node, "padding", [0, 0])


def test_an_argument_behind_one_given_by_keyword_is_added_by_keyword():
    node = call(aten.conv2d.default, x(), torch.randn(8, 4, 3, 3), stride=[2, 2])
    assert arguments.set_argument(node, "padding", [1, 1])
    assert len(node.args) == 2
    assert node.kwargs == {"stride": [2, 2], "padding": [1, 1]}


def test_an_argument_that_is_keyword_only_is_added_by_keyword():
    node = call(aten.add.Tensor, x(), y())
    assert arguments.set_argument(node, "alpha", 2)
    assert node.kwargs == {"alpha": 2}
    assert not arguments.set_argument(node, "alpha", 2)


def test_true_and_one_are_different_values_of_an_argument():
    node = Graph().call_function(aten.dropout.default, (None, 0.5, 1))
    assert arguments.set_argument(node, "train", True)
    assert node.args[2] is True


def test_an_argument_can_be_set_to_another_node_and_the_graph_knows():
    node = call(aten.add.Tensor, x(), y())
    left, right = node.args
    assert arguments.set_argument(node, "other", left)
    assert node.args == (left, left)
    assert not right.users


# --- training and mutation --------------------------------------------------------------------------------------------

# instance_norm(use_input_stats) is True in evaluation as well unless running statistics are kept: see `mode_switch`.
SWITCHED = {
    "training": "batch_norm native_batch_norm cudnn_batch_norm miopen_batch_norm _batch_norm_impl_index "
    "_native_batch_norm_legit _native_batch_norm_legit_functional rrelu rrelu_ rrelu_with_noise rrelu_with_noise_ "
    "rrelu_with_noise_functional",
    "train": "dropout dropout_ feature_dropout feature_dropout_ alpha_dropout alpha_dropout_ feature_alpha_dropout "
    "feature_alpha_dropout_ native_dropout lstm gru rnn_tanh rnn_relu quantized_lstm quantized_gru _cudnn_rnn "
    "_cudnn_init_dropout_state miopen_rnn mkldnn_rnn_layer _lstm_mps",
}


def test_the_ops_of_aten_that_behave_differently_in_training_are_exactly_these():
    found: dict[str, set[str]] = {"training": set(), "train": set()}
    for op in all_of_aten():
        named = [a.name for a in op._schema.arguments if "train" in a.name and "bool" in str(a.type)]
        assert [arguments.training_argument(op)] == (named or [None])
        name = op._schema.name.removeprefix("aten::")
        if named and not name.endswith("_backward"):
            found[named[0]].add(name)
    assert found == {argument: set(names.split()) for argument, names in SWITCHED.items()}


def test_the_training_argument_really_switches():
    node = call(aten.dropout.default, x(), 0.5, False)
    name = arguments.training_argument(node.target)
    assert name is not None
    arguments.set_argument(node, name, True)
    assert (aten.dropout.default(x(), *node.args[1:]) == 0).any()


def test_what_is_no_aten_op_is_not_switched_and_writes_nothing():
    assert arguments.training_argument(operator.getitem) is None
    assert arguments.mutated_arguments(operator.getitem) == ()
    assert not arguments.mutates("output")


@pytest.mark.parametrize(
    ("op", "written", "in_place"),
    [
        (aten.add.Tensor, (), False),
        (aten.add_.Tensor, (0,), True),
        (aten.add.out, (3,), False),
        (aten.copy_.default, (0,), True),
        (aten._native_batch_norm_legit.default, (3, 4), False),
        (aten.view.default, (), False),
    ],
    ids=str,
)
def test_what_an_op_writes_to_is_read_from_its_schema(op, written, in_place):
    assert arguments.mutated_arguments(op) == written
    assert arguments.mutates(op) == bool(written)
    assert arguments.is_in_place(op) == in_place


def test_every_in_place_twin_writes_to_its_first_argument_and_no_copy_twin_does():
    for op in ops.known():
        if op is not ops.functional(op):
            assert arguments.is_in_place(op) == op._schema.name.endswith("_"), op


def test_what_torch_does_not_tag_is_elementwise_too():
    elementwise = [
        (aten.relu.default, 1),
        (aten.gelu_.default, 1),
        (aten.add.Tensor, 2),
        (aten.hardswish.default, 1),
        (aten.hardswish_.default, 1),
        (aten.log_sigmoid.default, 1),
    ]
    assert all(ops.is_elementwise(call(op, *[x()] * operands)) for op, operands in elementwise)
    assert ops.is_elementwise(call(aten.prelu.default, x(), torch.rand(4)))
    assert not any(
        ops.is_elementwise(call(op, x(), given)) for op, given in [(aten.matmul.default, x()), (aten.softmax.int, 1)]
    )


def test_windows_that_see_padding_only_are_found():
    """Against the convolution itself: of ones with ones, a window that sees nothing of the input sums to 0."""
    generator = random.Random(0)
    seen = set()
    for _ in range(300):
        size, kernel, stride, padding, dilation = (generator.randint(low, 4) for low in (1, 1, 1, 0, 1))
        if size + 2 * padding < (kernel - 1) * dilation + 1:
            continue
        steps = {"stride": [stride], "padding": [padding], "dilation": dilation}
        sums = torch.conv1d(torch.ones(1, 1, size), torch.ones(1, 1, kernel), None, stride, padding, dilation)
        seen.add(bool((sums == 0).any()))
        assert arguments.sees_padding_only((size,), (kernel,), **steps) == bool((sums == 0).any()), (
            size,
            kernel,
            steps,
        )
    assert seen == {True, False}
