"""What one call returns: the converted model, the program for its target, the report, and what it was made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch.fx import GraphModule

from ..algorithms import Tried
from ..checks import checked
from ..debug import MixedPrecision
from ..errors import FileError
from ..files import write_files
from ..lowering.common.program import LoweredProgram
from ..report import Report
from ..report.text import better_dynamic
from .graph_file import file_of_graph
from .manifest import Manifest
from .recipe import Recipe

__all__ = ["Quantized"]


@dataclass(frozen=True)
class Quantized:
    """A model, quantized and lowered.

    Args:
        model: the converted graph, which runs in torch.
        program: what the target runs; None where the quantizer says no lowering. The exported graph is saved then.
        report: what became of each operator.
        recipe: that was carried out; None for a quantizer of the caller's.
        manifest: versions, seed and hashes.
        accuracy: what the budget measured; None without one.
        left: nodes that stay in float for it.
        tried: algorithms that ran for it, and which of them were kept; () where plain quantization, or float, met it.
        search: for a budget of size or latency: the formats that were chosen, and what was measured beside them.
    """

    model: GraphModule
    program: LoweredProgram | None
    report: Report
    recipe: Recipe | None
    manifest: Manifest
    accuracy: float | None = None
    left: tuple[str, ...] = ()
    tried: tuple[Tried, ...] = ()
    search: MixedPrecision | None = None

    @checked(FileError)
    def save(self, folder: str | Path, name: str = "model") -> tuple[Path, ...]:
        """Write the program (or the graph), the report as `Report.save` does, the recipe and the manifest.

        Args:
            folder: that exists.
            name: of the program's file, without its suffix.

        Returns:
            The paths. All are written or none.

        Raises:
            LoweringError: there is no program, and torch cannot export the graph again.
            FileError: a file cannot be written; then all are as they were.
        """
        artefact = f"{name}{self.manifest.suffix}"
        report = self.report.contents(program=self.program)
        if self.program is not None:
            report[".txt"] += f"{self.program.text()}\n".encode()
        files = {artefact: self._artefact(), **{f"report{suffix}": told for suffix, told in report.items()}}
        if self.recipe is not None:
            files["recipe.yaml"] = self.recipe.to_yaml().encode()
        files["manifest.json"] = self.manifest.of_files(artefact, files).to_json().encode()
        return write_files({Path(folder) / name: content for name, content in files.items()})

    def _artefact(self) -> bytes:
        return file_of_graph(self.model) if self.program is None else self.program._file()

    def __str__(self) -> str:
        counts = f"{len(self.report.quantized)} operators quantized, {len(self.report.skipped)} in float"
        if self.accuracy is not None:
            counts += f"; {len(self.left)} of them for the budget, which is met with {self.accuracy:.4g}"
        if self.search is not None:
            counts += f"\n{self.search}"
        counts += self._advice()
        return counts if self.program is None else f"{counts}\n{self.program}\n{self.program.verified}"

    def _advice(self) -> str:
        errors = self.report.record.output_errors
        if errors is None or not better_dynamic(errors):
            return ""
        return (
            f"\noutputs of the first batch: {errors.static:.1f} dB with static activations, {errors.dynamic:.1f} dB "
            "with dynamic ones: take mode 'dynamic' (in a configuration, is_dynamic=True)"
        )
