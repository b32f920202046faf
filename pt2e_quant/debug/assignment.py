"""One format for each op within a budget: as an integer program, and greedily.

With x[i, f] = 1 where op i has format f, sums of x * noise and of x * size over all (i, f) are the predicted noise
power at the outputs (errors of different layers are nearly independent, so powers add) and the bytes of the weights.
One of them is bounded, the other one minimized, and each op has one format.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import QuantizationError

__all__ = ["Option", "greedy", "integer_program"]


@dataclass(frozen=True)
class Option:
    """One op in one format.

    noise: power of the error that it makes of the outputs, alone
    size:  bytes of its weights
    """

    op: str
    format: str
    noise: float
    size: float


def integer_program(options: list[Option], *, noise: float | None = None, size: float | None = None) -> list[Option]:
    """The best choice of one option for each op; [] where none is within the bound.

    Args:
        options: all of them.
        noise: bound of the sum of noise; the size is minimized then, and where sizes are equal the noise.
        size: bound of the sum of sizes; the noise is minimized then.

    Raises:
        QuantizationError: scipy is missing.
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError as missing:
        raise QuantizationError(
            "the integer program needs scipy, which the extra 'search' installs: pip install 'pt2e-quant[search]'"
        ) from missing
    ops = list(dict.fromkeys(one.op for one in options))
    once = [[float(one.op == op) for one in options] for op in ops]
    noises, sizes = [one.noise for one in options], [one.size for one in options]
    bounded, limit, cost = (sizes, size or 0.0, noises) if noise is None else (noises, noise, sizes)
    bound = LinearConstraint([_shares(bounded, limit)], ub=1)
    goal = [a + 1e-6 * b for a, b in zip(_shares(cost, max(cost)), _shares(bounded, max(bounded)), strict=True)]
    found = milp(
        goal, constraints=[LinearConstraint(once, 1, 1), bound], integrality=[1] * len(options), bounds=Bounds(0, 1)
    )
    return [] if found.x is None else [one for one, taken in zip(options, found.x, strict=True) if taken > 0.5]


def greedy(options: list[Option], *, noise: float | None = None, size: float | None = None) -> list[Option]:
    """A choice that starts from the smallest options and takes, again and again, the step that saves most noise a byte.

    Args and result as of `integer_program`; the smallest choice must be within a bound of size.
    """
    chosen = {one.op: one for one in sorted(options, key=lambda one: (-one.size, -one.noise))}
    if size is not None and _size(chosen) > size:
        return []
    while noise is None or _noise(chosen) > noise:
        room = float("inf") if size is None else size - _size(chosen)
        steps = [step for step in _steps(options, chosen) if step[1].size - step[0].size <= room]
        if not steps:
            return [] if noise is not None else list(chosen.values())
        best = max(steps, key=_saved_a_byte)[1]
        chosen[best.op] = best
    return list(chosen.values())


def _steps(options: list[Option], chosen: dict[str, Option]) -> Iterator[tuple[Option, Option]]:
    for one in options:
        before = chosen[one.op]
        if one.noise < before.noise:
            yield before, one


def _saved_a_byte(step: tuple[Option, Option]) -> float:
    before, after = step
    return (before.noise - after.noise) / max(after.size - before.size, 1e-9)


def _noise(chosen: dict[str, Option]) -> float:
    return sum(one.noise for one in chosen.values())


def _size(chosen: dict[str, Option]) -> float:
    return sum(one.size for one in chosen.values())


def _shares(values: list[float], of: float) -> list[float]:
    """In units of a bound, as solvers want them; what is out of the question stays near the rest."""
    return [min(value / max(of, 1e-300), 10.0) for value in values]
