"""Rotation: spread the outliers of a decoder's residual stream over all channels, by matrices in its weights.

Ashkboos et al., QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs, NeurIPS 2024, arXiv:2404.00456, and the part of
Liu et al., SpinQuant, ICLR 2025, arXiv:2405.16406, that needs no training. |x Q| = |x|, so a norm without a weight
commutes with Q: its weight goes into the linears behind it, and these undo Q (`residual_stream` has what must hold). A
LayerNorm takes out the mean, too; that is done to what makes the stream, and it becomes an RMSNorm (Ashkboos et al.,
SliceGPT, ICLR 2024, arXiv:2401.15024, section 3). Within attention, the values of each head are rotated by a matrix of
their own, which the output's linear undoes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from ..arguments import bind, set_argument
from ..checks import checked
from ..errors import CaptureError
from ..graph.attributes import attribute, free_name, insert_attribute
from ..graph.constants import Constants
from ..graph.module import ExportedModule, finish, tidy
from ..graph.write import Writer
from ..ops import ATTENTION, LINEAR, MATMUL, factors, is_value_preserving
from ..passes.private_copy import private_copy
from .calibrated import constant_linears
from .folds import Fold, find_fold
from .hadamard import rotation_matrix
from .residual_stream import LINEARS, Norm, ResidualStream, residual_streams
from .sites import set_parameter, uses_of

__all__ = ["Rotated", "rotate"]

aten = torch.ops.aten
_MIXES_ROWS = (*ATTENTION, *MATMUL)


@dataclass(frozen=True)
class Rotated:
    """What became of one stream, or of the values of one attention.

    Args:
        tensor: name of a tensor of it.
        size: channels that are mixed: of the stream, or of one head.
        kind: "hadamard" or "random", for sizes that have no Hadamard matrix here; None where nothing was done.
        changed: names of the operators whose weights were rotated.
        reason: why nothing was done; None where something was.
    """

    tensor: str
    size: int
    kind: str | None
    changed: tuple[str, ...]
    reason: str | None = None

    def __str__(self) -> str:
        if self.reason is not None:
            return f"{self.tensor}: left alone ({self.reason})"
        return f"{self.tensor}: {self.size} channels rotated ({self.kind}), in {', '.join(self.changed)}"


@checked(CaptureError)
def rotate(
    model: ExportedProgram | GraphModule, *, seed: int = 0, values: bool = True, online: bool = False
) -> tuple[ExportedModule, list[Rotated]]:
    """Rotate the residual streams of a float model, and the values of its attention.

    The outputs stay what they were but for the rounding of products in another order. Weights that a rotation changes
    for one reader alone, as those of an embedding that is the output layer too, become two.

    Args:
        model: an exported float model in evaluation mode; it stays as it was.
        seed: of the random signs.
        values: rotate the values of attention, head by head.
        online: rotate, too, what the other linears read that write to a stream (the products in an MLP), by a product
            with a constant matrix while the model runs. It pays for activations of 4 bits.

    Returns:
        The rotated graph, to be prepared like the original, and what was done to each stream and each attention.
    """
    gm = private_copy(model)
    job = _Job(gm, torch.Generator().manual_seed(seed))
    done = [job.rotate_stream(stream) for stream in list(residual_streams(gm, Constants(gm)))]
    if values or online:
        done += job.rotate_inputs(values, online)
    return finish(tidy(gm)), done  # type: ignore[arg-type]  # tidy returns what it was given


class _Job:
    def __init__(self, gm: GraphModule, generator: torch.Generator) -> None:
        self._gm = gm
        self._generator = generator
        self._parameters = _Parameters(gm)
        self._write = Writer(gm, "rotate")
        self._ends: set[Node] = set()
        """Linears that write to a rotated stream."""

    def rotate_stream(self, stream: ResidualStream) -> Rotated:
        name = min(stream.values, key=lambda node: (node.op == "get_attr", node)).name
        if stream.reason is not None:
            return Rotated(name, stream.size, None, (), stream.reason)
        turn, kind = rotation_matrix(stream.size, self._generator)
        for reader, norm in stream.readers.items():
            self._read(reader, turn, norm)
        for writer in stream.writers:
            self._make(writer, turn - turn.mean(0) if stream.centred else turn)
        for norm in stream.norms:
            self._without_weight(norm)
        self._ends |= set(stream.writers)
        changed = dict.fromkeys((*stream.writers, *stream.readers))
        return Rotated(name, stream.size, kind, tuple(node.name for node in changed))

    def _read(self, linear: Node, turn: Tensor, norm: Norm | None) -> None:
        """Let a linear read rows that are rotated, and neither scaled nor shifted by their norm."""
        rows = self._parameters.rows(linear)
        if norm is not None and norm.shift is not None:
            self._add(linear, rows @ self._parameters.value(norm.shift))
        if norm is not None and norm.scale is not None:
            rows = rows * self._parameters.value(norm.scale)
        self._parameters.put_rows(linear, rows @ turn.to(rows))

    def _add(self, linear: Node, shift: Tensor) -> None:
        """Add a number to each output of a linear."""
        bias = factors(linear)[2]
        if bias is not None:
            self._parameters.put(linear, bias, self._parameters.value(bias) + shift)
        elif linear.target in LINEAR:
            set_argument(linear, "bias", self._parameters.new(linear, shift))
        else:
            self._write.follow(linear, lambda made: made + self._write.constant(shift.to(made.dtype)))

    def _make(self, node: Node, turn: Tensor) -> None:
        """Let a node make rotated rows."""
        parameters = self._parameters
        if node.target == aten.embedding.default:
            table = bind(node)["weight"]
            parameters.put(node, table, parameters.value(table) @ turn.to(parameters.value(table)))
        elif node.target in LINEARS:
            rows, bias = parameters.rows(node), factors(node)[2]
            parameters.put_rows(node, turn.to(rows).T @ rows)
            if bias is not None:
                parameters.put(node, bias, parameters.value(bias) @ turn.to(rows))
        else:
            for reader in list(node.users):
                parameters.put(reader, node, parameters.value(node) @ turn.to(parameters.value(node)))

    def _without_weight(self, norm: Norm) -> None:
        node = norm.node
        if node.target == aten.rms_norm.default:
            set_argument(node, "weight", None)
        elif node.target == aten.layer_norm.default:
            bound = bind(node)
            with self._write.before(node):
                arguments = bound["input"], bound["normalized_shape"], None, bound["eps"]
                self._write.replace(node, self._write.call(aten.rms_norm.default, *arguments))
        else:
            self._leave_out(node, norm.scale)
        if norm.shift_at is not None:
            self._leave_out(norm.shift_at, norm.shift)

    def _leave_out(self, node: Node, vector: Node | None) -> None:
        self._write.replace(node, next(source for source in node.all_input_nodes if source is not vector))

    def rotate_inputs(self, values: bool, online: bool) -> Iterator[Rotated]:
        """Rotate what linears read: values that attention mixed, and what else a writer of a stream reads."""
        for linear in constant_linears(self._gm, Constants(self._gm)):
            x = bind(linear)["input"]
            attention = _attention_before(x)
            if attention is None:
                if online and linear in self._ends:
                    yield self._rotate_online(linear)
            elif values:
                yield self._rotate_values(linear, x, int(attention.meta["val"].shape[-1]))

    def _rotate_values(self, linear: Node, x: Node, size: int) -> Rotated:
        fold = find_fold(x, [linear])
        reason = fold if isinstance(fold, str) else _why_no_heads(fold, size)
        if isinstance(fold, str) or reason is not None:
            return Rotated(x.name, size, None, (), reason)
        producer = fold.producer
        turn, kind = rotation_matrix(size, self._generator)
        bias = factors(producer)[2]
        rows = self._parameters.rows(producer)
        self._parameters.put_rows(producer, _by_heads(rows.T, turn).T)
        if bias is not None:
            self._parameters.put(producer, bias, _by_heads(self._parameters.value(bias), turn))
        self._parameters.put_rows(linear, _by_heads(self._parameters.rows(linear), turn))
        return Rotated(x.name, size, kind, (producer.name, linear.name))

    def _rotate_online(self, linear: Node) -> Rotated:
        x, rows = factors(linear)[0], self._parameters.rows(linear)
        turn, kind = rotation_matrix(rows.shape[1], self._generator)
        with self._write.before(linear, like=x):
            product = self._write(x) @ self._parameters.new(linear, turn)
        linear.replace_input_with(x, product.node)
        self._parameters.put_rows(linear, rows @ turn.to(rows))
        return Rotated(x.name, len(turn), kind, (linear.name,))


def _by_heads(value: Tensor, turn: Tensor) -> Tensor:
    """Rotate each run of channels, of the size of a head, in the last dimension."""
    heads: Tensor = value.unflatten(-1, (-1, len(turn)))
    return (heads @ turn.to(value)).flatten(-2)


def _attention_before(x: Node) -> Node | None:
    """The attention whose output a tensor is, moved; or the product of matrices that is its last step."""
    while is_value_preserving(x) and len(x.all_input_nodes) == 1:
        x = x.all_input_nodes[0]
    return x if x.target in ATTENTION or (x.target in MATMUL and x.meta["val"].dim() > 2) else None


def _why_no_heads(fold: Fold, size: int) -> str | None:
    """Why the channels between two linears cannot be mixed in runs of `size`, as attention leaves them together."""
    producer, *between = fold.path
    if producer.target not in LINEAR:
        return f"{producer.name}, which makes it, has no rows"
    other = next((node for node in between if not (node.target in _MIXES_ROWS or is_value_preserving(node))), None)
    if other is not None:
        return f"{other.name} ({other.target}) scales its channels"
    heads = fold.rows.unflatten(0, (-1, size)) if len(fold.rows) % size == 0 else fold.rows[:, None]
    whole = torch.equal(heads, heads[:, :1] + torch.arange(size)) and not bool((heads[:, 0] % size).any())
    return None if whole else f"the channels of a head do not stay together from {producer.name} on"


class _Parameters:
    """Reads what operators have as weights, in float64, and gives them others; those who share them keep theirs."""

    def __init__(self, gm: GraphModule) -> None:
        self._gm = gm
        self._names = free_name(gm, "_rotated_")

    def value(self, node: Node) -> Tensor:
        """What a constant node holds now."""
        stored = node.op == "get_attr"
        held = attribute(self._gm, str(node.target)).detach() if stored else Constants(self._gm).value(node)
        wide: Tensor = held.to(torch.float64)
        return wide

    def rows(self, linear: Node) -> Tensor:
        """The weight of a linear, or of a product, as (outputs, inputs)."""
        value = self.value(factors(linear)[1])
        return value if linear.target in LINEAR else value.T

    def put_rows(self, linear: Node, rows: Tensor) -> None:
        """Give a linear another weight, of (outputs, inputs)."""
        self.put(linear, factors(linear)[1], rows if linear.target in LINEAR else rows.T)

    def put(self, user: Node, old: Node, value: Tensor) -> None:
        """Let a node read a value in the place of another."""
        if old.op == "get_attr" and uses_of(self._gm, str(old.target)) == 1:
            set_parameter(self._gm, old, value)
        else:
            user.replace_input_with(old, self.new(user, value, like=old))

    def new(self, user: Node, value: Tensor, like: Node | None = None) -> Node:
        """A read of a new parameter before a node, in the type and on the device of what it reads or makes."""
        kept = (user if like is None else like).meta["val"]
        held = nn.Parameter(value.to(kept.device, kept.dtype).contiguous(), requires_grad=False)
        with self._gm.graph.inserting_before(user):
            return insert_attribute(self._gm, next(self._names), held, like=user if like is None else like, by="rotate")
