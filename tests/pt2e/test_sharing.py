"""Sharing qparams is an equivalence relation: neither the order of annotations nor the choice of anchor matters."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.errors import SharingError
from pt2e_quant.pt2e.sharing import DisjointSets, share
from pt2e_quant.quantizer import FixedQParamsQuantizationSpec, SharedQuantizationSpec
from pt2e_quant.quantizer.reading import SpecReading, read_spec
from tests.nets import export
from tests.pt2e.kit import ACT, STATIC, ByHand, Toy, affine_by_hand, annotate, calls, quantizes, the_call

aten = torch.ops.aten

COUNT = 7  # tensors that may share


class Fan(nn.Module):
    """One tensor times 1, 2, ... 7: seven results with ranges that differ, concatenated."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.mul(x, float(number)) for number in range(1, COUNT + 1)], 1)


EXPORTED = export(Fan(), torch.randn(2, 3))


def components(links: Iterable[tuple[int, int]]) -> set[frozenset[int]]:
    """Connected components by merging lists until nothing changes: slow, obvious, and no union-find."""
    groups = [{number} for number in range(COUNT)]
    for first, second in links:
        one = next(group for group in groups if first in group)
        other = next(group for group in groups if second in group)
        if one is not other:
            one |= other
            groups.remove(other)
    return {frozenset(group) for group in groups}


@st.composite
def forests(draw: st.DrawFn) -> dict[int, int]:
    """For each of the tensors the one that it shares with; a tensor that shares with itself has a spec of its own."""
    order = draw(st.permutations(range(COUNT)))
    return {number: draw(st.sampled_from(order[: place + 1])) for place, number in enumerate(order)}


def shared_by(parents: dict[int, int], order: Iterable[int]) -> ByHand:
    """Annotate the tensors in the given order, each with ACT or with a reference to its parent."""

    def function(gm: GraphModule) -> None:
        nodes = calls(gm, aten.mul.Tensor)
        for number in order:
            parent = parents[number]
            annotate(nodes[number], {}, ACT if parent == number else SharedQuantizationSpec(nodes[parent]))

    return ByHand(function)


def groups_and_scales(quantizer: ByHand, x: Tensor) -> tuple[set[frozenset[str]], dict[str, object]]:
    prepared = prepare_pt2e(EXPORTED, quantizer)
    prepared(x)
    groups = explain(convert_pt2e(prepared)).groups
    members = {frozenset(group.members) for group in groups}
    return members, {member: (group.scale, group.zero_point) for group in groups for member in group.members}


@settings(max_examples=25)
@given(parents=forests(), order=st.permutations(range(COUNT)))
def test_groups_are_the_connected_components(parents, order):
    names = [node.name for node in calls(EXPORTED.module(), aten.mul.Tensor)]
    members, _ = groups_and_scales(shared_by(parents, order), torch.ones(2, 3))
    assert members == {frozenset(names[number] for number in group) for group in components(parents.items())}


@settings(max_examples=15)
@given(parents=forests(), order=st.permutations(range(COUNT)), anchor=st.integers(0, COUNT - 1))
def test_order_and_anchor_change_no_qparams(parents, order, anchor):
    """Users' item 15: the order of annotations and the choice of anchor change no qparams.

    The same groups, each hung on another member, annotated in another order.
    """
    x = torch.tensor([[-0.5, 1.0, 0.25]]).repeat(2, 1)
    other: dict[int, int] = {}
    for group in components(parents.items()):
        first = sorted(group)[anchor % len(group)]
        other.update(dict.fromkeys(group, first))
    plain = groups_and_scales(shared_by(parents, range(COUNT)), x)
    assert groups_and_scales(shared_by(other, order), x) == plain


@settings(max_examples=15)
@given(parents=forests())
def test_a_group_has_the_range_of_all_its_members(parents):
    x = torch.tensor([[-0.5, 1.0, 0.25]]).repeat(2, 1)
    _, qparams = groups_and_scales(shared_by(parents, range(COUNT)), x)
    names = [node.name for node in calls(EXPORTED.module(), aten.mul.Tensor)]
    for group in components(parents.items()):
        scale, zero_point = affine_by_hand([x * (number + 1) for number in group])
        for number in group:
            assert qparams[names[number]] == (pytest.approx(scale, rel=1e-6), zero_point)


@given(st.lists(st.tuples(st.integers(0, COUNT - 1), st.integers(0, COUNT - 1))))
def test_disjoint_sets_are_connected_components(links):
    sets: DisjointSets[int] = DisjointSets()
    for number in range(COUNT):
        sets.add(number)
    for first, second in links:
        sets.union(first, second)
    found: dict[int, set[int]] = {}
    for number in range(COUNT):
        found.setdefault(sets.find(number), set()).add(number)
    assert {frozenset(group) for group in found.values()} == components(links)


@given(st.permutations(range(COUNT)), forests())
def test_the_order_of_the_specs_does_not_matter(order, parents):
    graph = Graph()
    nodes = [graph.placeholder(f"x{number}") for number in range(COUNT)]
    specs = {nodes[n]: ACT if parents[n] == n else SharedQuantizationSpec(nodes[parents[n]]) for n in order}
    roots = {node: root for node, (root, _) in share(specs_read(specs), set()).items()}
    for first, second in itertools.combinations(range(COUNT), 2):
        together = any({first, second} <= group for group in components(parents.items()))
        assert (roots[nodes[first]] == roots[nodes[second]]) is together


# --- long chains ------------------------------------------------------------------------------------------------------


class Permutes(nn.Module):
    """A convolution and two ops that undo each other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).permute(0, 2, 3, 1).permute(0, 3, 1, 2)


def chain(length: int) -> GraphModule:
    """The exported graph of a convolution and `length` permutes, spliced together, for export takes 10 ms per op."""
    gm = export(Permutes(), torch.randn(1, 3, 2, 2)).module()
    first, last = calls(gm, aten.permute.default)
    for _ in range(length // 2 - 1):
        for node in (first, last):
            with gm.graph.inserting_after(last):
                copied = gm.graph.node_copy(node)
            last.replace_all_uses_with(copied)
            copied.args = (last, *copied.args[1:])
            last = copied
    gm.recompile()
    return gm


def test_a_chain_of_2000_shared_ops_has_one_scale():
    prepared = prepare_pt2e(chain(2000), Toy(STATIC))
    prepared(torch.randn(1, 3, 2, 2))
    report = explain(convert_pt2e(prepared))
    longest = max(len(group.members) for group in report.groups)
    assert longest == 1 + 2 * 2000  # the convolution, and both ends of each op
    assert len(report.groups) == 3


@pytest.mark.slow
def test_preparing_a_chain_takes_time_in_proportion_to_its_length():
    """Quadratic growth would take 8 times as long per op; 3 times leaves room for a busy machine."""

    def seconds_per_op(length: int) -> float:
        exported = chain(length)
        runs = []
        for _ in range(3):
            start = time.perf_counter()
            prepare_pt2e(exported, Toy(STATIC))
            runs.append(time.perf_counter() - start)
        return min(runs) / length

    assert seconds_per_op(1000) < 3 * seconds_per_op(125)


def specs_read(specs: dict[Node, object]) -> dict[Node, SpecReading]:
    return {node: read_spec(spec) for node, spec in specs.items()}


def linked(count: int) -> dict[Node, object]:
    """A chain of references, each to the one after it, the concrete spec at its end."""
    graph = Graph()
    nodes = [graph.placeholder(f"x{number}") for number in range(count)]
    return {**{a: SharedQuantizationSpec(b) for a, b in itertools.pairwise(nodes)}, nodes[-1]: ACT}


def test_references_may_be_chained_deeper_than_pythons_stack():
    assert len({root for root, _ in share(specs_read(linked(5000)), set()).values()}) == 1


# --- what cannot be shared --------------------------------------------------------------------------------------------


class Two(nn.Module):
    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return torch.tanh(torch.sigmoid(x)) + index


def prepared_with(function: object) -> GraphModule:
    exported = export(Two(), torch.randn(2, 3), torch.tensor([[0, 1, 2]]))
    return prepare_pt2e(exported, ByHand(function))


def ends(gm: GraphModule) -> tuple[Node, Node]:
    return the_call(gm, aten.sigmoid.default), the_call(gm, aten.tanh.default)


def test_a_circle_without_a_spec_is_an_error_that_shows_it():
    """Users' item 15: a circle without a concrete spec is one typed error that shows the chain."""

    def function(gm: GraphModule) -> None:
        sigmoid, tanh = ends(gm)
        annotate(sigmoid, {}, SharedQuantizationSpec((sigmoid, tanh)))
        annotate(tanh, {sigmoid: SharedQuantizationSpec(tanh)}, SharedQuantizationSpec(sigmoid))

    with pytest.raises(SharingError) as caught:
        prepared_with(function)
    assert str(caught.value).splitlines()[:4] == [
        "these tensors share qparams with each other in a circle, none of them says which:",
        "  sigmoid: shared with sigmoid -> tanh",
        "  sigmoid -> tanh: shared with tanh",
        "  tanh: shared with sigmoid",
    ]
    assert "Give one of them a QuantizationSpec" in str(caught.value)


def test_a_tensor_that_shares_with_itself_is_a_circle():
    def function(gm: GraphModule) -> None:
        sigmoid, _ = ends(gm)
        annotate(sigmoid, {}, SharedQuantizationSpec(sigmoid))

    with pytest.raises(SharingError, match="in a circle"):
        prepared_with(function)


def test_sharing_with_a_tensor_that_is_not_annotated_names_both():
    """Users' item 15: so is an anchor without annotation."""

    def function(gm: GraphModule) -> None:
        sigmoid, tanh = ends(gm)
        annotate(tanh, {}, SharedQuantizationSpec(sigmoid))

    with pytest.raises(SharingError) as caught:
        prepared_with(function)
    message = str(caught.value)
    assert message.startswith("tanh is to share qparams with sigmoid, which is not quantized itself:")
    assert "node sigmoid = aten.sigmoid.default(x)" in message
    assert "test_sharing.py:" in message
    assert "Annotate the tensor that it shares with" in message


def test_sharing_with_an_integer_tensor_is_an_error():
    def function(gm: GraphModule) -> None:
        add = the_call(gm, aten.add.Tensor)
        tanh, index = add.args
        annotate(add, {index: ACT, tanh: SharedQuantizationSpec((index, add))})

    with pytest.raises(SharingError, match="index -> add, which is not quantized itself"):
        prepared_with(function)


class FixedAndObserved(nn.Module):
    """A sigmoid, whose qparams are known, concatenated with a convolution, whose qparams are not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.sigmoid(x), self.conv(x)], 1)


def test_a_fixed_output_is_requantized_where_its_reader_shares_with_others():
    """Users' item 15: cat of a fixed sigmoid and a conv follows a documented rule.

    Each site names at most one other, so a group has one spec: that of the concatenation wins on the edge.
    """
    fixed = FixedQParamsQuantizationSpec(torch.int8, 1 / 256, -128, -128, 127)

    def function(gm: GraphModule) -> None:
        sigmoid, conv, cat = (the_call(gm, op) for op in (aten.sigmoid.default, aten.conv1d.default, aten.cat.default))
        annotate(sigmoid, {}, fixed)
        annotate(conv, {}, ACT)
        inputs = {conv: ACT, sigmoid: SharedQuantizationSpec((conv, cat))}
        annotate(cat, inputs, SharedQuantizationSpec((conv, cat)))

    x = torch.randn(2, 3, 4)
    prepared = prepare_pt2e(export(FixedAndObserved(), x), ByHand(function))
    prepared(x)
    converted = convert_pt2e(prepared)
    first, second = the_call(converted, aten.cat.default).args[0]
    (after,) = the_call(converted, aten.cat.default).users
    assert first.args[1:] == second.args[1:] == after.args[1:]
    assert [node.args[1:3] for node in quantizes(converted)].count((1 / 256, -128)) == 1


def test_a_tensor_that_is_concatenated_with_itself_shares_one_scale():
    """Users' item 15: cat([x, x]) with inputs and output shared is one group, and no endless recursion."""

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, x], 1)

    def function(gm: GraphModule) -> None:
        cat = the_call(gm, aten.cat.default)
        (x,) = cat.all_input_nodes
        annotate(cat, {x: ACT}, SharedQuantizationSpec((x, cat)))

    x = torch.randn(2, 3, 4)
    prepared = prepare_pt2e(export(Twice(), x), ByHand(function))
    prepared(x)
    converted = convert_pt2e(prepared)
    assert [group.members for group in explain(converted).groups] == [("x -> cat", "cat")]
    assert {node.args[1:] for node in quantizes(converted)} == {quantizes(converted)[0].args[1:]}
    scale = quantizes(converted)[0].args[1]
    assert (converted(x) - torch.cat([x, x], 1)).abs().max() <= scale / 2 * 1.001  # half a step, once


# --- inputs that an op ties together ----------------------------------------------------------------------------------

SMALL, LARGE = torch.tensor([[-0.5, 0.25, 1.0, 0.75]]).repeat(3, 1), torch.tensor([[40.0, -20.0, 7.0, 3.0]])


class Beside(nn.Module):
    """A small and a large tensor, concatenated; `reads` says who reads the small one besides."""

    def __init__(self, reads: str) -> None:
        super().__init__()
        self.reads, self.linear = reads, nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        h = torch.add(x, x)
        moved = h.view(4, 3).view(3, 4) if "after a view" in self.reads else h
        merged = torch.cat([moved, y], 0)
        if "other cat" in self.reads:
            return merged, torch.cat([merged, moved], 0)
        return merged, self.linear(h) if "linear" in self.reads else h


def groups_of(reads: str) -> dict[str, tuple[float, int]]:
    """Of each use and output the qparams, by name."""
    prepared = prepare_pt2e(export(Beside(reads), SMALL, LARGE), Toy(STATIC))
    prepared(SMALL, LARGE)
    groups = explain(convert_pt2e(prepared)).groups
    return {member: (group.scale, group.zero_point) for group in groups for member in group.members}


@pytest.mark.parametrize(("reads", "moved"), [("linear", "add"), ("linear, cat after a view", "view_1")])
def test_who_reads_a_tensor_beside_a_concatenation_keeps_its_own_scale(reads, moved):
    found = groups_of(reads)
    own, tied = affine_by_hand([2 * SMALL]), affine_by_hand([2 * SMALL, LARGE])
    assert found["add"] == found["add -> linear"] == (pytest.approx(own[0], rel=1e-6), own[1])
    assert found[f"{moved} -> cat"] == found["y -> cat"] == found["cat"] == (pytest.approx(tied[0], rel=1e-6), tied[1])


@pytest.mark.parametrize("reads", ["nobody", "other cat"])
def test_a_tensor_that_only_concatenations_read_has_their_scale_and_is_quantized_once(reads):
    found = groups_of(reads)
    assert len({found[site] for site in found if site.startswith("add") or "cat" in site}) == 1
