"""Tables of small models for the x86 tests: a row is one model; a whole table is compiled as one program.

Compiling costs seconds for every loop that Inductor writes. So the rows of a table are branches of one module, each on
an input of its own, and every row is judged on its own kernels and its own output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule

from pt2e_quant import Report, convert_pt2e, explain, prepare_pt2e, prepare_qat_pt2e
from pt2e_quant.lowering.inductor import lower_to_inductor
from quantizers.x86_inductor import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
    get_x86_inductor_int4_weight_only_quantization_config,
    get_x86_inductor_linear_dynamic_fp16_config,
    get_x86_inductor_weight_only_quantization_config,
)
from tests.nets import randomize

BEYOND = 31
"""How much larger a batch runs than was compiled with: sizes below 16 are laid out in a way of their own."""

__all__ = ["BEYOND", "RECIPES", "Net", "Outcome", "Row", "converted", "outcomes", "report"]

RECIPES = {
    "static": get_default_x86_inductor_quantization_config(),
    "reduced": get_default_x86_inductor_quantization_config(reduce_range=True),
    "dynamic": get_default_x86_inductor_quantization_config(is_dynamic=True),
    "dynamic, reduced": get_default_x86_inductor_quantization_config(is_dynamic=True, reduce_range=True),
    "fp16": get_x86_inductor_linear_dynamic_fp16_config(),
    "weight only": get_x86_inductor_weight_only_quantization_config(),
    "int4": get_x86_inductor_int4_weight_only_quantization_config(32),
    "trained": get_default_x86_inductor_quantization_config(is_qat=True),
    "trained, dynamic": get_default_x86_inductor_quantization_config(is_qat=True, is_dynamic=True),
}


class Net(nn.Module):
    """`function(net, x)` as a module; keywords become its submodules and parameters."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


@dataclass(frozen=True)
class Row:
    """make: builds the model, which takes one tensor; shape: of that tensor; kernels: what its operators become."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    kernels: tuple[str, ...] = ()
    inputs: Callable[[tuple[int, ...]], Tensor] = field(default=torch.randn)


@dataclass(frozen=True)
class Outcome:
    """What became of one row.

    kernels: "kernel + what is fused into it" of each quantized operator, in the order of the graph
    error:   largest difference from the converted graph
    changed: share of the outputs that differ from it by more than float rounding, 2e-6 of the largest
    largest: largest number of the output
    kept:    the input was not written to
    """

    kernels: tuple[str, ...]
    error: float
    changed: float
    largest: float
    kept: bool


class _Table(nn.Module):
    def __init__(self, branches: list[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(branch(x) for branch, x in zip(self.branches, inputs, strict=True))


def quantizer(recipe: str) -> X86InductorQuantizer:
    return X86InductorQuantizer().set_global(RECIPES[recipe])


def report(model: nn.Module, x: Tensor, recipe: str = "static", **options: Any) -> Report:
    """The report after prepare; `options` go to torch.export."""
    exported = torch.export.export(randomize(model).eval(), (x,), **options)
    return explain(prepare_pt2e(exported, quantizer(recipe), allow_empty=True))


def converted(model: nn.Module, inputs: tuple[Tensor, ...], recipe: str = "static", **options: Any) -> GraphModule:
    training = RECIPES[recipe].is_qat
    exported = torch.export.export(randomize(model).train(training), inputs, **options)
    prepared = (prepare_qat_pt2e if training else prepare_pt2e)(exported, quantizer(recipe))
    with torch.no_grad():
        prepared(*inputs)
    return convert_pt2e(prepared)


def outcomes(rows: dict[str, Row], recipe: str = "static", mode: str = "compile") -> dict[str, Outcome]:
    """Prepare, calibrate, convert, compile and run a table with a dynamic batch, on a batch of another size."""
    made = {name: (row.make(), row.inputs(row.shape)) for name, row in rows.items()}
    batches = tuple({0: Dim(f"batch{index}", min=1, max=64)} for index in range(len(rows)))
    inputs = tuple(x for _, x in made.values())
    graph = converted(_Table([m for m, _ in made.values()]), inputs, recipe, dynamic_shapes=(batches,))
    program = lower_to_inductor(graph, mode=mode)
    others = [row.inputs((row.shape[0] + BEYOND, *row.shape[1:])) for row in rows.values()]
    with torch.no_grad():
        wanted = graph(*others)
    before = [x.clone() for x in others]
    found = program(*others)
    places = {node.name: _branch(node) for node in graph.graph.nodes}
    kernels: dict[str, list[str]] = {name: [] for name in rows}
    for kernel in program.kernels:
        kernels[list(rows)[places[kernel.node]]].append(" + ".join((kernel.kernel, *kernel.fused)))
    return {
        name: Outcome(
            tuple(kernels[name]),
            float((mine - theirs).abs().max()),
            float(((mine - theirs).abs() > 2e-6 * theirs.abs().max().clamp(min=1.0)).double().mean()),
            float(theirs.abs().max()),
            torch.equal(x, old),
        )
        for name, mine, theirs, x, old in zip(rows, found, wanted, others, before, strict=True)
    }


def _branch(node: torch.fx.Node) -> int:
    """Index of the branch that a node was captured in; -1 for what belongs to none."""
    paths = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    found = [path.split("branches.")[-1].split(".")[0] for path in paths if "branches." in path]
    return int(found[0]) if found else -1
