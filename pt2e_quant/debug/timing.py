"""How long each op of an artefact takes: a converted graph is lowered, its program profiled, kernels joined with ops.

Before this: the lowerings, which callers of `mixed_precision` bring along. After it: a budget of latency.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from torch.fx import GraphModule, Node

from ..errors import TargetingError
from ..graph.nested import every_node
from ..graph.run import Arguments
from ..latency import Profile
from ..ops import RELUS
from ..where import exported_name, node_id

__all__ = ["JOINED", "Lower", "OpTimes", "Timed", "check_times", "time_ops"]


JOINED = "the profile of an Inductor program joins all products of one kernel, so that no op has a time of its own"


class Timed(Protocol):
    """A lowered program, as far as its time is measured."""

    def profile(self, *args: Any, **kwargs: Any) -> Profile:
        """Run it several times on these arguments and tell where the time goes."""


Lower = Callable[[GraphModule], Timed]
"""From a converted graph to a program, such as `lower_to_onnx`."""


@dataclass(frozen=True)
class OpTimes:
    """whole: microseconds of a run. of: those of the kernels of each op, by its name in the exported program."""

    whole: float
    of: dict[str, float]

    def rest(self, ops: Iterable[str]) -> float:
        """Microseconds outside of these ops."""
        return max(self.whole - sum(self.of[op] for op in ops), 0.0)


def time_ops(made: GraphModule, lower: Lower, batch: Arguments) -> OpTimes:
    """Lower a converted graph, run its program on a batch, and sum up the kernels of each op."""
    profile = lower(made).profile(*batch.args, **batch.kwargs)
    times = profile.of_nodes()
    found: dict[str, float] = defaultdict(float)
    for node in every_node(made):
        timed = next((one for one in map(node_id, _with_activation(node)) if one in times), None)
        if timed is not None:
            found[exported_name(node)] += times[timed]
    return OpTimes(profile.microseconds, dict(found))


def _with_activation(node: Node) -> tuple[Node, ...]:
    """An op, and the one after it by which its kernel may be named, since it computes both."""
    after = next(iter(node.users), None)
    return (node, after) if after is not None and len(node.users) == 1 and after.target in RELUS else (node,)


def check_times(times: OpTimes, ops: Iterable[str], name: str) -> None:
    """Raise where the time of an op is not known.

    Raises:
        TargetingError: the profile joins no kernel with it; names it.
    """
    unknown = [op for op in ops if op not in times.of]
    if unknown:
        raise TargetingError(
            f"mixed_precision: in {name!r}, the profile of the program joins no kernel with {', '.join(unknown)}. "
            f"Those of lower_to_onnx and lower_to_executorch do for products; {JOINED}."
        )
