"""What every lowering returns: a program to run and verify, with an account of what each operator became."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torch.fx import GraphModule, Node

from ...checks import checked
from ...errors import LoweringError
from ...files import write_file
from ...graph.nested import every_node
from ...graph.run import Arguments
from ...pt2e.record import record_of
from ...where import module_path, source_line
from .entry import Inputs
from .verify import Lower, Verification, verified

__all__ = ["Fallback", "LoweredProgram", "Remark", "Saved", "remarks_on_float", "section", "verify_program"]


@dataclass(frozen=True)
class Remark:
    """Something worth knowing that did not stop the lowering; `node` is a node of the converted graph."""

    node: str
    text: str

    def __str__(self) -> str:
        return f"{self.node}: {self.text}"


@dataclass(frozen=True)
class Fallback:
    """An operator that does not run where it was meant to.

    Args:
        node: name of the node of the converted graph that it comes from (of the lowered graph where there is none).
        op: the operator, such as 'aten.convolution.default'.
        module: dotted path of the module that it was captured in; '' is the root, None when not recorded.
        source: line of the user's code, None when not recorded.
        reason: why, and what it became.
    """

    node: str
    op: str
    module: str | None
    source: str | None
    reason: str

    @classmethod
    def of(cls, name: str, op: str, origin: Node, reason: str) -> Fallback:
        """With the place that a node comes from."""
        return cls(name, op, module_path(origin), source_line(origin), reason)

    def __str__(self) -> str:
        place = ", ".join(filter(None, (f"in {self.module!r}" if self.module else None, self.source)))
        return f"{self.node} ({self.op}){f', {place}' if place else ''}: {self.reason}"


P = TypeVar("P", bound="LoweredProgram")


def remarks_on_float(gm: GraphModule) -> tuple[Remark, ...]:
    """Of a graph that holds no integer tensors but those of the model: what is lowered is a float program."""
    nodes = every_node(gm)
    record = record_of(gm)
    if any(str(node.target).startswith("quantized_decomposed") for node in nodes) or (record and record.representation):
        return ()
    text = "nothing in this graph is quantized, so the program computes in floating point; prepare_pt2e comes first"
    return (Remark(gm.graph.output_node().name, text),)


class Saved(ABC):
    """What is written to a file, and told as text and as JSON."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Everything but the code, as plain data."""

    @abstractmethod
    def _file(self) -> bytes:
        """What stands in the file."""

    @checked(LoweringError)
    def save(self, path: str | Path) -> Path:
        """Write the file; a reader sees the old one or the whole new one, never a part. Returns the path.

        Raises:
            FileError: it cannot be written; what was there before is still there.
            LoweringError: the program cannot leave this process.
        """
        return write_file(path, self._file())

    def to_json(self) -> str:
        """Everything but the code, as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __repr__(self) -> str:
        return f"<{self}>"


class LoweredProgram(Saved):
    """A program of one backend. `fate` and `sections` are its account; dataclasses of the backends add the fields."""

    kernels: tuple[Any, ...]
    remarks: tuple[Remark, ...]
    verified: Verification

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it on the arguments of the model, and return what the model returns."""

    @abstractmethod
    def run_flat(self, *args: Any, **kwargs: Any) -> Sequence[Any]:
        """Run it on the arguments of the model; its outputs, flat."""

    @abstractmethod
    def reset(self) -> None:
        """Give the buffers that the model writes to what they started with."""

    @abstractmethod
    def fate(self, node: str) -> str:
        """What a node of the converted graph became; `Report.lowered` asks."""

    @abstractmethod
    def sections(self) -> dict[str, Sequence[Any]]:
        """What there is to tell besides the summary, by title."""

    @checked(LoweringError)
    def verify(self, converted: GraphModule, batches: Iterable[Any]) -> Verification:
        """Run the program and compare every output with the converted graph's, as lowering does.

        Args:
            converted: the graph that was lowered.
            batches: what to run both on, as `graph.run.batches_of` takes it.

        Raises:
            LoweringError: an output differs by more than rounding explains, or the program cannot run.
        """
        return self._verified(converted, batches, None, "")

    def text(self) -> str:
        """All there is to tell, for people: the summary, what verifying showed, operators and remarks."""
        rows = {**self.sections(), "Expect": self.remarks}
        return "\n".join(
            [str(self), str(self.verified), *(section(title, rows[title]) for title in rows if rows[title])]
        )

    def account(self) -> dict[str, Any]:
        """What `to_dict` of every backend holds."""
        plain = {name: [asdict(row) for row in getattr(self, name)] for name in ("kernels", "remarks")}
        return {**plain, "verified": self.verified.to_dict()}

    def count(self, precision: str) -> int:
        """How many kernels run in this precision."""
        return sum(kernel.precision == precision for kernel in self.kernels)

    def _verified(
        self, converted: GraphModule, batches: Iterable[Any], lower: Lower | None, advice: str
    ) -> Verification:
        self.reset()
        try:
            return verified(converted, self.run_flat, batches, lower, advice)
        finally:
            self.reset()


def verify_program(
    program: P,
    graph: GraphModule,
    inputs: Inputs,
    verify: bool | Iterable[Any],
    lower: Lower | None = None,
    advice: str = "",
) -> P:
    """The program with what running it showed; as it is when `verify` is False.

    Args:
        program: what was made of `graph`, with the arguments `inputs`.
        verify: as the lowerings take it; True stands for `inputs`.
        lower, advice: as `verified` takes them.
    """
    if verify is False:
        return program
    batches = [Arguments(*inputs)] if verify is True else verify
    return replace(program, verified=program._verified(graph, batches, lower, advice))  # type: ignore[type-var]


def section(title: str, rows: Iterable[Any]) -> str:
    """A title and indented lines."""
    return "\n".join([f"{title}:", *(f"  {row}" for row in rows)])
