"""What lowering returns: the program as bytes, with an account of what each operator became.

Made by `executorch.lower_to_executorch`. All of it is plain data, except `run`, which loads the bytes into ExecuTorch's
runtime for Python.
"""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import LoweringError
from .calling import CallingConvention
from .entry import quietly

__all__ = [
    "ExecutorchProgram",
    "Kernel",
    "Remark",
    "Sizes",
    "Undelegated",
    "section",
    "write_file",
]


@dataclass(frozen=True)
class Undelegated:
    """An operator that runs in ExecuTorch's portable kernels, on the CPU, outside every delegate.

    Args:
        node: name of the node of the converted graph that it comes from (of the lowered graph where there is none).
        op: the operator of the lowered graph, such as 'aten.convolution.default'.
        module: dotted path of the module that it was captured in; '' is the root, None when not recorded.
        source: line of the user's code, None when not recorded.
        reason: why no backend took it.
    """

    node: str
    op: str
    module: str | None
    source: str | None
    reason: str

    def __str__(self) -> str:
        place = ", ".join(filter(None, (f"in {self.module!r}" if self.module else None, self.source)))
        return f"{self.node} ({self.op}){f', {place}' if place else ''}: {self.reason}"


@dataclass(frozen=True)
class Kernel:
    """An operator inside a delegate, and the arithmetic that it runs in.

    Args:
        node: name of the node of the converted graph that it comes from.
        op: the operator of the lowered graph.
        precision: 'int8': integers in and out; 'dynamic': activations become integers while running, the output is
            floating point; 'float': floating point, between a dequantize and a quantize where its neighbours are int8.
        delegate: index of the delegate that holds it.
    """

    node: str
    op: str
    precision: Literal["int8", "dynamic", "float"]
    delegate: int


@dataclass(frozen=True)
class Remark:
    """Something worth knowing that did not stop the lowering; `node` is a node of the converted graph."""

    node: str
    text: str

    def __str__(self) -> str:
        return f"{self.node}: {self.text}"


@dataclass(frozen=True)
class Sizes:
    """Bytes of the program. file >= delegates + constants; the rest is the schedule, alignment and the header.

    Args:
        file: the whole program.
        delegates: what the delegates hold: their graphs and their weights.
        constants: parameters and buffers of the operators that run outside every delegate.
    """

    file: int
    delegates: int
    constants: int


@dataclass(frozen=True, repr=False)
class ExecutorchProgram:
    """A program for ExecuTorch (.pte) and what every operator of the model became in it.

    Args:
        buffer: the program, as it stands in a .pte file.
        delegates: how many parts of the model a backend took; 1 when it took everything.
        undelegated: operators outside every delegate, each with the reason.
        kernels: operators inside the delegates, each with its arithmetic.
        remarks: differences to expect between the program and the converted graph.
        sizes: where the bytes are.
        calling: how the arguments of the model become the program's inputs.
    """

    buffer: bytes
    delegates: int
    undelegated: tuple[Undelegated, ...]
    kernels: tuple[Kernel, ...]
    remarks: tuple[Remark, ...]
    sizes: Sizes
    calling: CallingConvention = field(compare=False)

    def save(self, path: str | Path) -> Path:
        """Write the .pte file; a reader sees the old file or the whole new one, never a part. Returns the path."""
        return write_file(Path(path), self.buffer)

    def run(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Execute the program in ExecuTorch's runtime, with the arguments that the model takes; its outputs, flat.

        The program is loaded at the first call. Buffers that the model writes to (a key-value cache) keep their state
        from one call to the next.

        Raises:
            LoweringError: the arguments do not fit the model, or the runtime refuses the program or the arguments.
        """
        inputs = self.calling.flatten(args, kwargs)
        try:
            with torch.no_grad():
                outputs = self._method.execute(inputs)
        except RuntimeError as error:
            shapes = ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else repr(x) for x in inputs)
            raise LoweringError(
                f"ExecuTorch's runtime failed on inputs {shapes}: {error}\n"
                "  Sizes must lie within those that the model was lowered for (dynamic_shapes), and dtypes must agree."
            ) from error
        return tuple(outputs)

    def constant(self, name: str) -> Any:
        """A constant of the program: 'input_0_scale', 'output_1_zero_point', ... of its integer inputs and outputs.

        Raises:
            LoweringError: the program has no constant of this name.
        """
        from ._executorch import runtime

        with quietly():
            program = runtime().load_program(self.buffer)
        if name not in program.method_names or name == "forward":
            known = ", ".join(sorted(program.method_names - {"forward"})) or "none"
            raise LoweringError(f"the program has no constant {name!r}; there is: {known}")
        return program.load_method(name).execute([])[0]

    @cached_property
    def _method(self) -> Any:
        from ._executorch import runtime

        try:
            with quietly():
                return runtime().load_program(self.buffer).load_method("forward")
        except RuntimeError as error:
            raise LoweringError(
                f"ExecuTorch's runtime cannot load this program: {error}\n"
                "  A backend refused its delegate. Lower with preflight=True, which names the operator that breaks a "
                "rule of the backend; if that finds nothing, please report it with the model."
            ) from error

    def count(self, precision: str) -> int:
        """How many operators inside the delegates run in 'int8', 'dynamic' or 'float'."""
        return sum(kernel.precision == precision for kernel in self.kernels)

    def text(self) -> str:
        """All there is to tell, for people: the summary, then operators outside, float kernels and remarks."""
        parts = [str(self)]
        if self.undelegated:
            parts.append(section("Outside every delegate, in portable kernels", self.undelegated))
        floating = [f"{kernel.node} ({kernel.op})" for kernel in self.kernels if kernel.precision == "float"]
        if floating and len(floating) < len(self.kernels):
            parts.append(section("In a delegate, in floating point", floating))
        if self.remarks:
            parts.append(section("Expect", self.remarks))
        return "\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the bytes, as plain data."""
        return {
            "delegates": self.delegates,
            "sizes": asdict(self.sizes),
            "undelegated": [asdict(left) for left in self.undelegated],
            "kernels": [asdict(kernel) for kernel in self.kernels],
            "remarks": [asdict(remark) for remark in self.remarks],
        }

    def to_json(self) -> str:
        """Everything but the bytes, as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        sizes = self.sizes
        kinds = ", ".join(f"{self.count(kind)} {kind}" for kind in ("int8", "dynamic", "float") if self.count(kind))
        plural = "s" if self.delegates != 1 else ""
        inside = f"{len(self.kernels)} operators in {self.delegates} delegate{plural}" + (
            f" ({kinds})" if kinds else ""
        )
        return (
            f"ExecuTorch program, {_size(sizes.file)} (delegates {_size(sizes.delegates)}, constants outside "
            f"{_size(sizes.constants)}): {inside}, {len(self.undelegated)} outside"
        )

    def __repr__(self) -> str:
        return f"<{self}>"


def write_file(path: Path, content: bytes) -> Path:
    """Write a file so that a reader sees the old one or the whole new one, never a part. Returns the path."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def section(title: str, rows: Any) -> str:
    """A title and indented lines."""
    return "\n".join([f"{title}:", *(f"  {row}" for row in rows)])


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
