"""Time several programs in turns, so that a noisy machine is noisy for all of them."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["TIMED", "Timing", "take_turns"]

WARM, TIMED = 3, 4  # runs in a turn: the one before has left its weights in the caches
PAUSE = 0.05  # seconds; thread pools go on spinning after their last run, for the next in turn to wait


@dataclass
class Timing:
    """Of one program: seconds of every timed run, by the clock and of all threads together, and the last answers."""

    walls: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)

    def milliseconds(self) -> tuple[float, float]:
        """Medians: (by the clock, of CPU). On a machine that others use too, the second says more."""
        return statistics.median(self.walls) * 1e3, statistics.median(self.busy) * 1e3


@torch.no_grad()
def take_turns(programs: Mapping[str, Callable[..., Any]], inputs: Sequence[tuple[Any, ...]]) -> dict[str, Timing]:
    """Run every program on the first inputs, then every program on the second, and so on; one answer for each."""
    timings = {name: Timing() for name in programs}
    for batch, name in itertools.product(inputs, programs):
        timing = timings[name]
        for repeat in range(WARM + TIMED):
            start, worked = time.perf_counter(), time.process_time()
            answer = programs[name](*batch)
            if repeat >= WARM:
                timing.walls.append(time.perf_counter() - start)
                timing.busy.append(time.process_time() - worked)
        timing.answers.append(answer)
        time.sleep(PAUSE)
    return timings
