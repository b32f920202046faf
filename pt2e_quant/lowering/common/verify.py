"""Verified lowering: a program is run on inputs of the model, and each output is held against the converted graph's.

How far may they be apart? A runtime rounds each integer tensor as the graph does or, where a value lies near the edge
of two integers, to the other one; both are within one step of the exact value. So the graph is run once more with every
tensor rounded at random to one of its two neighbouring integers (stochastic rounding). A program may differ from the
graph by no more than twice what that run differs (6 dB). Programs that agree within one step, or to the rounding of
their float type, need no such run. The first operator at which a program comes apart is found by bisection: the graph
is cut after an operator, lowered, run and compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from ...arguments import bind, training_argument
from ...errors import LoweringError, QuantizationError
from ...graph.attributes import own_written
from ...graph.module import ExportedModule, clone, drop_dead, finish
from ...graph.run import Arguments, Watcher, batches_of, flat_inputs
from ...grid import Grid
from ...ops import QUANTIZE, is_dequantize
from ...pt2e.record import record_of
from ...sqnr import decibels, power
from ...where import locate

__all__ = ["NOT_RUN", "Difference", "Lower", "Program", "Verification", "cut_after", "unverified", "verified"]

Program = Callable[..., Sequence[Any]]
"""Runs a lowered program on the arguments of the model and returns its outputs, flat."""

Lower = Callable[[GraphModule, Arguments], Program]
"""Makes a program of a graph, or of a part of one, to be run on these arguments."""

ALLOWED_DB = 6.0
"""A program may have twice the error of a graph that is rounded at random."""

ROUNDING_DB = {torch.float64: 80.0, torch.float32: 60.0, torch.float16: 40.0, torch.bfloat16: 25.0}
"""Agreement that counts as the rounding of a float type, for programs that round no tensor to integers. Chosen, not
derived: the unit roundoff is 144 dB in float32, 66 in float16, 48 in bfloat16, and sums of many terms in another order
lose some of that. The faults that this check was made for are below 30 dB in float32."""


@dataclass(frozen=True)
class Difference:
    """One output of the program against the same output of the converted graph, over all batches.

    Args:
        index, node: the output, and the node of the converted graph that gives it.
        sqnr: signal-to-quantization-noise ratio, in dB; infinite where they are equal.
        steps: largest difference in steps of the output's grid; None where it has none.
        allowed: the least sqnr that passes, in dB; None where the difference is that of rounding without a doubt.
    """

    index: int
    node: str
    sqnr: float
    steps: float | None
    allowed: float | None = None

    @property
    def passed(self) -> bool:
        return self.allowed is None or self.sqnr >= self.allowed

    def __str__(self) -> str:
        steps = "" if self.steps is None else f", at most {self.steps:.3g} steps of its grid"
        bound = "" if self.allowed is None else f" (at least {self.allowed:.1f} dB are expected)"
        agreement = "equal" if math.isinf(self.sqnr) and self.sqnr > 0 else f"{self.sqnr:.1f} dB{steps}"
        return f"output {self.index} ({self.node}): {agreement}{bound}"


@dataclass(frozen=True)
class Verification:
    """What running a program showed. `reason`: why it was not run; None when it was."""

    outputs: tuple[Difference, ...] = ()
    batches: int = 0
    reason: str | None = None

    def __bool__(self) -> bool:
        return self.reason is None and all(output.passed for output in self.outputs)

    @property
    def sqnr(self) -> float:
        """The lowest of all outputs, in dB; NaN when nothing was compared."""
        return min((output.sqnr for output in self.outputs), default=math.nan)

    def __str__(self) -> str:
        if self.reason is not None:
            return f"not verified: {self.reason}"
        plural = "es" if self.batches != 1 else ""
        return f"verified on {self.batches} batch{plural}: {'; '.join(map(str, self.outputs))}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; infinite numbers as None."""
        plain = asdict(self)
        for output in plain["outputs"]:
            output.update({key: None for key, value in output.items() if value in (math.inf, -math.inf)})
        return plain


def unverified(reason: str) -> Verification:
    """What stands in a program that was not run."""
    return Verification(reason=reason)


NOT_RUN = unverified("verify=False")


def verified(
    converted: GraphModule,
    run: Program,
    batches: Iterable[Any],
    lower: Lower | None = None,
    advice: str = "",
) -> Verification:
    """Run a program and compare every output with the converted graph's.

    Args:
        converted: the graph that was lowered, as the user has it; stays as it is.
        run: the program, with the buffers that it writes to as they are in `converted`.
        batches: what to run it on, as `graph.run.batches_of` takes it.
        lower: makes a program of a part of the graph, to find the first operator that comes apart.
        advice: what else to say in the error.

    Raises:
        LoweringError: an output differs by more than rounding explains, or the program cannot run.
    """
    random = next((node for node in converted.graph.nodes if _is_random(node)), None)
    if random is not None:
        return unverified(f"{random.name} draws random numbers, so no two runs are alike")
    held = list(batches_of(batches, "verify"))
    result = _compared(converted, run, held)
    if result or result.reason is not None:
        return result
    failed = "\n".join(f"- {output}" for output in result.outputs if not output.passed)
    where = "" if lower is None else _where(converted, lower, held[0])
    raise LoweringError(
        "the program computes something else than the converted graph, by more than rounding explains:\n"
        f"{failed}\n{where}{advice}  Keep that operator in float and report this with the model; "
        "verify=False skips the check, and the program says so."
    )


def _compared(converted: GraphModule, run: Program, batches: Sequence[Arguments]) -> Verification:
    graph = _own(converted)
    try:
        expected = [_outputs(graph, batch) for batch in batches]
    except QuantizationError:
        raise
    except Exception as error:  # noqa: BLE001  # ops check what they are given when they run
        return unverified(f"the converted graph itself does not run on these inputs ({type(error).__name__}: {error})")
    got = [[_copied(value) for value in run(*own.args, **own.kwargs)] for own in map(_own_arguments, batches)]
    if {len(outputs) for outputs in got} != {len(outputs) for outputs in expected}:
        raise LoweringError(f"the program returns {len(got[0])} outputs, the converted graph {len(expected[0])}")
    found = [_difference(converted, index, expected, got) for index in _tensor_outputs(expected[0])]
    if all(map(_is_rounding, found)):
        return Verification(tuple(output for output, _ in found), len(batches))
    return Verification(tuple(_bounded(converted, batches, expected, found)), len(batches))


def _bounded(
    converted: GraphModule,
    batches: Sequence[Arguments],
    expected: list[list[Any]],
    found: list[tuple[Difference, torch.dtype]],
) -> Iterable[Difference]:
    """The differences, each with the least dB that it must have: those of a graph that is rounded at random."""
    graph = _own(converted)
    rounded = [_outputs(graph, batch, dither=True) for batch in batches]
    for output, dtype in found:
        noise, _ = _difference(converted, output.index, expected, rounded)
        allowed = min(noise.sqnr - ALLOWED_DB, ROUNDING_DB.get(dtype, math.inf))
        yield Difference(output.index, output.node, output.sqnr, output.steps, allowed)


def _is_rounding(found: tuple[Difference, torch.dtype]) -> bool:
    output, dtype = found
    within_a_step = output.steps is not None and output.steps <= 1.01  # a scale is rounded to float32
    return within_a_step or output.sqnr >= ROUNDING_DB.get(dtype, math.inf)


# --- running the graph ------------------------------------------------------------------------------------------------


def _own(converted: GraphModule) -> ExportedModule:
    """A copy with buffers of its own, so that running it leaves no trace."""
    graph = clone(converted)
    own_written(graph)
    return finish(graph)


def _outputs(graph: GraphModule, batch: Arguments, dither: bool = False) -> list[Any]:
    runner = _Dithered(graph) if dither else None
    batch = _own_arguments(batch)
    with torch.no_grad():
        if runner is None:
            outputs = graph(*batch.args, **batch.kwargs)
        else:
            outputs = runner.run(*flat_inputs(graph, batch), enable_io_processing=False)
    return [_copied(value) for value in pytree.tree_leaves(outputs)]


class _Dithered(Watcher):
    """Runs a graph that quantizes to either neighbour at random: to the nearer one more often."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm, lambda node, value: None)
        self._random = torch.Generator().manual_seed(0)

    def run_node(self, n: Node) -> Any:
        if n.target not in QUANTIZE:
            return super().run_node(n)
        (x, *qparams), kwargs = self.fetch_args_kwargs_from_env(n)
        scale = qparams[0]
        step = _along(n, x, scale) if isinstance(scale, Tensor) and scale.numel() > 1 else scale
        noise = torch.rand(x.shape, generator=self._random).to(x.device, x.dtype) - 0.5
        return n.target(x + (noise * step).to(x.dtype), *qparams, **kwargs)


def _along(quantize: Node, x: Tensor, scale: Tensor) -> Tensor:
    """Scales of rows or channels, in a shape that broadcasts to the tensor."""
    if scale.dim() == x.dim():
        return scale
    axis = next((a for a in quantize.args[3:] if isinstance(a, int)), 0)
    shape = [1] * x.dim()
    shape[axis] = -1
    return scale.reshape(shape)


def _own_arguments(batch: Arguments) -> Arguments:
    """Copies, so that a model which writes to its inputs leaves those of the other run as they are."""
    return Arguments(*pytree.tree_map(_copied, tuple(batch)))


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _is_random(node: Node) -> bool:
    """Whether a node draws random numbers when it runs: a dropout of an exported model in eval mode draws none."""
    op = node.target
    if not isinstance(op, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in op.tags:
        return False
    given, training = bind(node), training_argument(op)
    return (training is None or bool(given[training])) and given.get("dropout_p") != 0.0


# --- numbers ----------------------------------------------------------------------------------------------------------


def _tensor_outputs(outputs: list[Any]) -> list[int]:
    return [index for index, value in enumerate(outputs) if isinstance(value, Tensor)]


def _difference(
    converted: GraphModule, index: int, expected: list[list[Any]], got: list[list[Any]]
) -> tuple[Difference, torch.dtype]:
    node = pytree.tree_leaves(converted.graph.output_node().args[0])[index]
    pairs = [(one[index], other[index]) for one, other in zip(expected, got, strict=True)]
    for one, other in pairs:
        if not isinstance(other, Tensor) or one.shape != other.shape or one.dtype != other.dtype:
            got_words = f"{other.dtype} {list(other.shape)}" if isinstance(other, Tensor) else repr(other)
            raise LoweringError(
                f"output {index} ({node}) of the program is {got_words}, of the converted graph "
                f"{one.dtype} {list(one.shape)}"
            )
    dtype = pairs[0][0].dtype
    apart = [_apart(one, other) for one, other in pairs]
    signal = power(one.double().nan_to_num(0.0, 0.0, 0.0) for one, _ in pairs)
    grid = _grid_of_output(converted, index, node)
    largest = max((float(difference.max()) for difference in apart if difference.numel()), default=0.0)
    steps = None if grid is None else largest / (grid.scale if dtype.is_floating_point else 1)
    return Difference(index, str(node), decibels(signal, power(apart)), steps), dtype


def _apart(one: Tensor, other: Tensor) -> Tensor:
    """|one - other| of each value; 0 where both are the same infinity or no number, infinite where one alone is."""
    a, b = one.double(), other.double()
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0.0, (a - b).abs()).nan_to_num(math.inf, math.inf)


def _grid_of_output(converted: GraphModule, index: int, node: Any) -> Grid | None:
    found = Grid.of_value(node) if isinstance(node, Node) else None
    record = record_of(converted)
    return record.outputs.get(index) if found is None and record is not None else found


# --- the first operator that comes apart ------------------------------------------------------------------------------


def _where(converted: GraphModule, lower: Lower, batch: Arguments) -> str:
    found = first_apart(converted, lower, batch)
    if found is None:
        return "  Every part of the graph that ends in an integer tensor agrees by itself.\n"
    return f"  It comes apart first at\n  {locate(found)}\n".replace("\n  in ", "\n    in ")


def first_apart(converted: GraphModule, lower: Lower, batch: Arguments) -> Node | None:
    """The first operator whose result differs: by bisection over the tensors that the graph quantizes, then upwards.

    Bisection ends at a tensor that differs where the one in front of it in the graph agrees; on a branch, one that it
    is computed from may differ already.
    """
    cuts = [node for node in converted.graph.nodes if is_dequantize(node) and _is_computed(node)]
    known: dict[Node, bool] = {}

    def agrees(cut: Node) -> bool:
        if cut not in known:
            known[cut] = _agrees(cut_after(converted, cut), lower, batch)
        return known[cut]

    low, high = 0, len(cuts)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if agrees(cuts[middle]) else (low, middle)
    found = cuts[low] if low < len(cuts) else None
    while found is not None:
        earlier = next((cut for cut in _computed_from(found, set(cuts)) if not agrees(cut)), None)
        if earlier is None:
            return _operator_of(found)
        found = earlier
    return None


def _computed_from(cut: Node, cuts: set[Node]) -> list[Node]:
    """The cuts that the tensor is computed from with no other cut in between."""
    found: list[Node] = []
    pending, seen = list(cut.all_input_nodes), set(cut.all_input_nodes)
    while pending:
        node = pending.pop()
        if node in cuts:
            found.append(node)
            continue
        pending += [source for source in node.all_input_nodes if source not in seen]
        seen.update(node.all_input_nodes)
    return found


def _agrees(part: GraphModule, lower: Lower, batch: Arguments) -> bool:
    try:
        return bool(_compared(part, lower(part, batch), [batch]))
    except QuantizationError:
        return False


def cut_after(converted: GraphModule, node: Node) -> ExportedModule:
    """The graph up to a node, whose value is its only output."""
    part = clone(converted)
    last = next(one for one in part.graph.nodes if one.name == node.name)
    output = part.graph.output_node()
    output.args = ((last,),)
    output.meta["val"] = (last.meta.get("val"),)
    codegen: Any = part.graph._codegen
    if hasattr(codegen, "pytree_info"):
        codegen.pytree_info = codegen.pytree_info._replace(out_spec=pytree.tree_structure((0,)))
    return finish(drop_dead(part))  # type: ignore[arg-type]


def _is_computed(dequantize: Node) -> bool:
    source = dequantize.args[0]
    return isinstance(source, Node) and source.op == "call_function"


def _operator_of(dequantize: Node) -> Node:
    """What computes the tensor that is quantized."""
    quantize: Any = dequantize.args[0]
    source = quantize.args[0] if quantize.target in QUANTIZE else quantize
    return source if isinstance(source, Node) else dequantize
