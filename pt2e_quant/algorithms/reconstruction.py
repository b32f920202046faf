"""Reconstruction: round each weight up or down so that what a layer or block hands on stays as in the float model.

    adaround            layer by layer: Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization,
                        ICML 2020, arXiv:2004.10568
    reconstruct_blocks  block by block: Li et al., BRECQ: Pushing the Limit of Post-Training Quantization by Block
                        Reconstruction, ICLR 2021, arXiv:2102.05426; with values of activations that stay in float now
                        and then, at random: Wei et al., QDrop: Randomly Dropping Quantization for Extremely Low-bit
                        Post-Training Quantization, ICLR 2022, arXiv:2203.05740

The inputs are those behind all that was rounded before, the goal are the outputs of the float model. The loss is in
units of that of rounding to the nearest, so that one weight of the term that decides values serves all layers. Steps of
grids are first made as small as is best for the weight alone, where the loss agrees. What is no better than before on
the data is left as it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..checks import checked
from ..errors import CaptureError
from ..graph.attributes import attribute
from ..graph.module import ExportedModule, finish
from ..graph.run import on_batch
from ..progress import counted
from .blocks import Block, Per, blocks_of
from .finished import Finished, Outcome, model_of
from .rounding import rounded
from .sites import choose_weight, sites_of, static_grid, working_copy
from .soft_rounding import SoftRounding, clipped
from .stream import Round, Stream

__all__ = ["Reconstructed", "adaround", "reconstruct_blocks"]

_DECIDED, _RATE = 5.0, 3e-2
"""Weight of the term that decides values, beside a loss of 1 for rounding to the nearest; and learning rate of Adam.
Of 0.01 to 30, and 0.01 to 0.1, these left least error in three layers of a small net with 4 bits."""
_FREE = 0.2
"""Part of the steps before that term counts, and its exponents after them: from round to sharp."""
_BETAS = (20.0, 2.0)


@dataclass(frozen=True)
class Reconstructed:
    """What became of one layer or block.

    Args:
        block: path of its module, or name of its op.
        sites: names of the ops whose weights were rounded anew.
        gain: power of the error of its outputs on the data, before over after; 1.0 where nothing was done.
        reason: why nothing was done; None where something was.
    """

    block: str
    sites: tuple[str, ...]
    gain: float
    reason: str | None = None

    def __str__(self) -> str:
        done = f"error divided by {self.gain:.2f}" if self.reason is None else f"left alone ({self.reason})"
        return f"{self.block}: {done}"


@checked(CaptureError)
def adaround(
    prepared: GraphModule,
    data: Iterable[Any],
    *,
    steps: int = 300,
    seed: int = 0,
    resume: str | Path | None = None,
) -> tuple[ExportedModule, list[Reconstructed]]:
    """Round the weights of each linear and convolution up or down as is best for its outputs.

    Args:
        prepared: what `prepare_pt2e` returned, calibrated; it stays as it was.
        data: batches, as `graph.run.batches_of` takes them. A step takes one of them: many small ones are better than
            few large ones.
        steps: of the optimizer, for each layer.
        seed: of the order of batches.
        resume: a folder for what is done, a file for each layer; a second call with the same model, data and numbers
            goes on from there, after a crash too.

    Returns:
        The prepared graph with weights on their grids, to be converted like the original, and what was done.

    Raises:
        CaptureError: `prepared` is no such graph, or writes to its buffers; or a number is out of range.
        CalibrationError: there is no batch, or the model fails on one.
        FileError: the file cannot be written, or is of another job.
    """
    return _Job("adaround", "layer", steps, 0.0, seed).run(prepared, data, resume)


@checked(CaptureError)
def reconstruct_blocks(
    prepared: GraphModule,
    data: Iterable[Any],
    *,
    drop: float = 0.5,
    steps: int = 500,
    seed: int = 0,
    resume: str | Path | None = None,
) -> tuple[ExportedModule, list[Reconstructed]]:
    """Round the weights of each block (modules by their paths, see `blocks`) up or down as is best for its outputs.

    Args:
        prepared, data, seed, resume: as `adaround` takes them.
        drop: part of the values of activations that stay in float in a step (QDrop); 0.0 is BRECQ.
        steps: of the optimizer, for each block.

    Returns, raises: as `adaround`.
    """
    return _Job("reconstruct_blocks", "block", steps, drop, seed).run(prepared, data, resume)


@dataclass(frozen=True)
class _Job:
    name: str
    per: Per
    steps: int
    drop: float
    seed: int

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 <= self.drop < 1 or not 0 <= self.seed < 1 << 63:
            raise CaptureError(
                f"{self.name}: steps must be at least 1, drop in [0, 1) and seed in [0, 2 ** 63), got steps="
                f"{self.steps}, drop={self.drop}, seed={self.seed}"
            )

    def run(
        self, prepared: GraphModule, data: Iterable[Any], resume: str | Path | None
    ) -> tuple[ExportedModule, list[Reconstructed]]:
        asked_by = f"{self.name}(prepared, data)"
        gm = working_copy(prepared, asked_by)
        sites, reasons = sites_of(gm)
        stream = Stream(gm, data, asked_by)
        before, blocks = blocks_of(gm, sites, self.per)
        stream.advance(before)
        finished = Finished(resume, f"{self}, {len(blocks)} blocks, {len(stream.lanes)} batches, {model_of(gm, sites)}")
        done = [Reconstructed(name, (), 1.0, reason) for name, reason in reasons.items()]
        for number, block in enumerate(counted(blocks, self.name)):
            if block.sites:
                gain, chosen = finished.recall(number, lambda: self._block(stream, block, number))  # noqa: B023
                _apply(gm, block, chosen)
                names = tuple(site.node.name for site in block.sites)
                done.append(Reconstructed(block.name, names, gain, None if chosen else "nothing was better"))
            stream.advance(block.nodes)
        return finish(gm), done

    def _block(self, stream: Stream, block: Block, number: int) -> Outcome:
        """The gain; of each op scale, zero point and weight, where it is above 1."""
        attempt = _Attempt(stream, block)
        attempt.train(self.steps, self.drop, torch.Generator().manual_seed(self.seed + number))
        before, after = attempt.nearest, attempt.loss(attempt.decided)
        return (before / max(after, 1e-30), attempt.chosen()) if after < before else (1.0, {})


def _apply(gm: GraphModule, block: Block, chosen: dict[str, tuple[Tensor, ...]]) -> None:
    for site in block.sites if chosen else ():
        choose_weight(gm, site, *chosen[site.node.name])


class _Attempt:
    """One block at work: its inputs and goals of all batches, and its weights between integers."""

    def __init__(self, stream: Stream, block: Block) -> None:
        self._stream, self._block = stream, block
        self._inputs = [
            {node: (lane.exact[node], lane.rounded[node]) for node in block.sources} for lane in stream.lanes
        ]
        with torch.no_grad(), on_batch(stream.gm, "the prepared graph"):
            exact = [{node: both[0] for node, both in inputs.items()} for inputs in self._inputs]
            self._goals = [_floats(block.run_exact(stream, inputs)) for inputs in exact]
        self.nearest = self.loss(stream.round)
        self._put(clip=True)
        if self.loss(self.decided) > self.nearest:
            self._put(clip=False)

    def _put(self, *, clip: bool) -> None:
        """Every weight between the integers of its grid."""
        weights = {site: attribute(self._stream.gm, str(site.weight.target)).detach() for site in self._block.sites}
        grids = {site: static_grid(self._stream.gm, site, weight) for site, weight in weights.items()}
        self._grids = {site: clipped(weights[site], grid) if clip else grid for site, grid in grids.items()}
        self._soft = {site.weight: SoftRounding(weights[site], grid) for site, grid in self._grids.items()}

    def train(self, steps: int, drop: float, random: torch.Generator) -> None:
        optimizer = torch.optim.Adam([soft.v for soft in self._soft.values()], lr=_RATE)
        unit = max(self.nearest / len(self._goals), 1e-30)
        for step in range(steps):
            which = int(torch.randint(len(self._goals), (), generator=random))
            with torch.enable_grad():
                through = self._dropping(drop, random)
                inputs = {n: _mixed(e, r, drop, random) for n, (e, r) in self._inputs[which].items()}
                loss = self._error(which, inputs, through) / unit
                if step >= steps * _FREE:
                    part = (step / steps - _FREE) / (1 - _FREE)
                    beta = _BETAS[0] + (_BETAS[1] - _BETAS[0]) * part
                    loss = loss + _DECIDED * sum(soft.undecided(beta) for soft in self._soft.values())
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()

    def loss(self, through: Round) -> float:
        """Over all batches, with rounded inputs: power of the error of what the block hands on."""
        with torch.no_grad():
            inputs = [{node: both[1] for node, both in one.items()} for one in self._inputs]
            return sum(float(self._error(which, one, through)) for which, one in enumerate(inputs))

    def decided(self, node: Node, name: str, value: Tensor) -> Tensor:
        """Round as convert will, when this is chosen."""
        return self._soft[node].decided() if node in self._soft else self._stream.round(node, name, value)

    def chosen(self) -> dict[str, tuple[Tensor, ...]]:
        found: dict[str, tuple[Tensor, ...]] = {}
        for site in self._block.sites:
            grid: Any = self._grids[site]
            found[site.node.name] = (grid.scale, grid.zero_point, self._soft[site.weight].decided())
        return found

    def _error(self, which: int, inputs: dict[Node, Any], through: Round) -> Tensor:
        found = _floats(self._block.run(self._stream, inputs, through))
        errors = [(one - goal).float().square().sum() for one, goal in zip(found, self._goals[which], strict=True)]
        return torch.stack(errors).sum()

    def _dropping(self, drop: float, random: torch.Generator) -> Round:
        def through(node: Node, name: str, value: Tensor) -> Tensor:
            if node in self._soft:
                return self._soft[node]()  # type: ignore[no-any-return]
            if name in self._stream.of_weights:
                return self._stream.round(node, name, value)
            qparams = self._stream.grid(name)
            return value if qparams is None else _mixed(value, rounded(value, qparams), drop, random)

        return through


def _mixed(exact: Any, found: Any, drop: float, random: torch.Generator) -> Any:
    """A part of the values exact."""
    if not drop or not isinstance(exact, Tensor) or not exact.is_floating_point():
        return found
    kept = torch.rand(exact.shape, generator=random).to(exact.device) < drop
    return torch.where(kept, exact, found)


def _floats(values: list[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
