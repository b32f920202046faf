"""compare: a float model and what was made of it, node by node, in one pass over the data that keeps no tensors.

Of each tensor it says how large its error is, how much of that is its own (its inputs given in float) and how much it
inherits, and where in the user's code it comes from. Look first where the own error is largest: `Comparison.worst`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from ..checks import checked
from ..errors import CaptureError, QuantizationError
from ..fake_quantize import is_fake_quantizer
from ..graph.attributes import own_written
from ..graph.module import ExportedModule, finish
from ..graph.run import Arguments, batches_of, values_of
from ..passes.private_copy import private_copy
from ..sqnr import floating
from ..where import computed_name
from .comparison import Comparison, NodeError, OutputError
from .error_sums import ErrorSums
from .lockstep import Lockstep, Seen
from .pairs import join

__all__ = ["compare", "copy_to_run"]

_ASKED_BY = "compare(exact, found, data)"


@runtime_checkable
class Program(Protocol):
    """What lowering returns."""

    def run_flat(self, *args: Any, **kwargs: Any) -> Sequence[Any]: ...

    def reset(self) -> None: ...


@runtime_checkable
class ShowsInside(Protocol):
    """A program whose runtime writes down tensors inside: by (name of the float node, name of the converted one)."""

    def inner_values(self, *args: Any, **kwargs: Any) -> dict[tuple[str, str], Tensor]: ...


@checked(CaptureError)
def compare(
    exact: ExportedProgram | GraphModule, found: ExportedProgram | GraphModule | Program, data: Iterable[Any]
) -> Comparison:
    """Hold a model against its float original, on data.

    Both run once over the data, and the quantized ops once more on exact inputs; every tensor is measured as soon as
    both values are known, and dropped. Both models stay as they were: ranges, buffers and fake quantizers do not move.

    Args:
        exact: the float model, exported: what was given to prepare_pt2e.
        found: what prepare_pt2e, prepare_qat_pt2e or convert_pt2e returned, an integer reference, any of these after
            another export, or a lowered program. Of a program only the outputs can be seen, and of a .pte what
            ExecuTorch's event dump has: results of delegates and of what runs outside of them.
        data: batches, as `graph.run.batches_of` takes them; they are read once.

    Returns:
        The rows of all tensors, in the order of the graph, and those of the outputs.

    Raises:
        CaptureError: a model is no graph; or no node of `found` stems from `exact`.
        CalibrationError: there is no batch, or a model fails on one.
        QuantizationError: the two have different outputs.
    """
    original = copy_to_run(exact)
    if isinstance(found, GraphModule | ExportedProgram):
        return _compare_graphs(original, copy_to_run(found), data)
    return _compare_program(original, found, data)


def copy_to_run(model: ExportedProgram | GraphModule) -> ExportedModule:
    """A copy in evaluation mode whose runs leave the caller's model as it is: no buffer and no range moves."""
    gm = finish(private_copy(model))
    own_written(gm)
    memo: dict[int, Any] = {}  # one for all copies: modules that are called at several places stay one
    for name, module in list(gm.named_modules(remove_duplicate=False)):
        if is_fake_quantizer(module):
            own = copy.deepcopy(module, memo)
            own.enable_observer(getattr(own, "is_dynamic", False))
            path, _, leaf = name.rpartition(".")
            setattr(gm.get_submodule(path), leaf, own)
    gm.eval()
    return gm


def _compare_graphs(exact: ExportedModule, found: ExportedModule, data: Iterable[Any]) -> Comparison:
    pairs = join(exact, found)
    if not any(node.op == "call_function" for node, _ in pairs.shown):
        raise CaptureError(
            "no node of the second model stems from the first one, so there is nothing to compare. Pass the exported "
            "program that was given to prepare_pt2e, and what was made of it."
        )
    lockstep = Lockstep(exact, found, pairs)
    sums = {pair: ErrorSums() for pair in pairs.shown}
    outputs: list[ErrorSums] = []

    def see(seen: Seen) -> None:
        sums[seen.pair].add(seen.exact, seen.found, seen.own)

    for batch in batches_of(data, _ASKED_BY):
        _add_outputs(outputs, *lockstep.run(batch, see))
    rows = tuple(NodeError.of(node, held.name, one) for (node, held), one in sums.items())
    return Comparison(rows, _rows_of(outputs), tuple(node.name for node in pairs.missing))


def _compare_program(exact: ExportedModule, program: Program, data: Iterable[Any]) -> Comparison:
    nodes = {computed_name(node): node for node in exact.graph.nodes if node.op == "call_function"}
    names = {node.name for node in nodes.values()}
    sums: dict[tuple[str, str], ErrorSums] = {}
    outputs: list[ErrorSums] = []
    program.reset()
    try:
        for batch in batches_of(data, _ASKED_BY):
            ours, inside = values_of(exact, batch, names if isinstance(program, ShowsInside) else ())
            _add_outputs(outputs, ours, [_kept(value) for value in program.run_flat(*batch.args, **batch.kwargs)])
            for key, value in _shown_inside(program, batch).items():
                if key[0] in nodes and inside[nodes[key[0]].name].shape == value.shape:
                    sums.setdefault(key, ErrorSums()).add(inside[nodes[key[0]].name], value)
    finally:
        program.reset()
    rows = tuple(NodeError.of(nodes[name], held, one) for (name, held), one in sums.items())
    return Comparison(rows, _rows_of(outputs), (), (_remark(program),))


def _shown_inside(program: Program, batch: Arguments) -> dict[tuple[str, str], Tensor]:
    return program.inner_values(*batch.args, **batch.kwargs) if isinstance(program, ShowsInside) else {}


def _remark(program: Program) -> str:
    shown = "its outputs alone"
    if isinstance(program, ShowsInside):
        shown = "its outputs, what runs outside of delegates and what delegates return"
    kind = type(program).__name__
    return f"{kind} shows {shown}; for the tensors inside, compare the converted graph that was lowered"


def _kept(value: Any) -> Any:
    """Runtimes reuse the memory of their outputs."""
    return value.clone() if isinstance(value, Tensor) else value


def _add_outputs(sums: list[ErrorSums], exact: Sequence[Any], found: Sequence[Any]) -> None:
    ours, theirs = floating(exact), floating(found)
    if len(ours) != len(theirs):
        raise QuantizationError(f"the float model has {len(ours)} floating-point outputs, the other one {len(theirs)}")
    sums += [ErrorSums() for _ in ours[len(sums) :]]
    for one, value, other in zip(sums, ours, theirs, strict=True):
        one.add(value, other)


def _rows_of(outputs: list[ErrorSums]) -> tuple[OutputError, ...]:
    return tuple(OutputError.of(index, sums) for index, sums in enumerate(outputs))
