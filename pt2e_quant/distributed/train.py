"""synchronize: fake quantizers and batch norms of a model that several processes train, under DDP or FSDP.

In each forward, an observer of activations takes in the batches of all processes as one batch before its qparams are
computed: the range of the union is the union of the ranges, so that a moving average is bit for bit that of one process
on the whole batch. Running statistics become the mean over processes after each forward, since weights are rounded with
the scale that they give.

Before this: `prepare_qat_pt2e`, in each process alike. After it: the wrapper (DDP, FSDP) and the user's own loop.
"""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..arguments import bind
from ..calibration.watched import Watched, watched
from ..checks import checked
from ..errors import CalibrationError, DistributedError, QuantizationError
from ..fake_quantize import is_fake_quantizer
from ..graph.attributes import constant
from ..graph.nested import graphs
from ..meta import FROZEN_NORMS_KEY
from ..observer import ObserverBase
from ..observer.batch import remember
from ..passes.fold_batch_norm import is_batch_norm
from .ranks import Ranks

__all__ = ["synchronize"]

_RANGE = {"min_val", "max_val"}


@checked(DistributedError, but=("group",))
def synchronize(prepared: GraphModule, *, group: Any = None, timeout: float = 300.0) -> int:
    """Let the observers of a model that trains see the batches of all processes, and its batch norms agree.

    Scales and zero points are the same on all ranks from then on, in every forward. Every rank runs the same forwards:
    call `disable_observer` before one of them evaluates alone. Copies are synchronized too, pickled models are not.

    Args:
        prepared: what `prepare_qat_pt2e` returned, in each process for the same exported model and quantizer; before
            it is wrapped or compiled.
        group: process group of torch.distributed; None for all processes.
        timeout: longest wait for the others in one forward, in seconds.

    Returns:
        How many observers are synchronized. Those of weights need it not: weights are the same everywhere.

    Raises:
        CalibrationError: `prepared` is not what `prepare_qat_pt2e` returned.
        DistributedError: there is no process group; or an observer cannot say what it saw of one batch alone.
            A forward raises it where a process died or is late, or met NaN.
    """
    ranks = Ranks.of(group, timeout)
    fed = _fed_by_inputs(prepared)
    observers = [_observer(site) for site in watched(prepared) if site.name in fed]
    for observer in observers:
        observer._peers = _Peers(ranks)
    if not any(isinstance(hook, _Agree) for hook in prepared._forward_hooks.values()):
        prepared.register_forward_hook(_Agree(ranks))
    return len(observers)


def _fed_by_inputs(prepared: GraphModule) -> set[str]:
    """Names of the modules that are called on what depends on the inputs; all others see weights alone."""
    names: set[str] = set()
    for path, part in graphs(prepared):
        fed: set[Node] = set()
        for node in part.graph.nodes:
            if node.op == "placeholder" or not fed.isdisjoint(node.all_input_nodes):
                fed.add(node)
        names |= {f"{path}.{node.target}" if path else str(node.target) for node in fed if node.op == "call_module"}
    return names


def _observer(site: Watched) -> ObserverBase:
    inner = getattr(site.observer, "activation_post_process", None)
    if not is_fake_quantizer(site.observer) or not isinstance(inner, ObserverBase):
        raise DistributedError(
            f"{site.name} is a {type(site.observer).__name__}, not a fake quantizer of pt2e_quant:\n{site.location}\n"
            "  To calibrate, use merge_ranks; to train, specs whose observer_or_fake_quant_ctr is one."
        )
    if not hasattr(inner, "reset_min_max_vals"):
        raise DistributedError(
            f"{site.name} observes with {type(inner).__name__}, which cannot forget what it saw, so that a batch alone "
            f"cannot be exchanged:\n{site.location}\n  Take MovingAverageMinMaxObserver or MinMaxObserver."
        )
    return inner


@dataclass(frozen=True, eq=False)
class _Peers:
    """Watches a tensor in the place of an observer, with the observers of that place in the other processes."""

    ranks: Ranks

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's; compiled code can neither exchange nor raise
    def __call__(self, observer: ObserverBase, x: Tensor) -> None:
        if x.is_meta:
            return
        alone, problem = _unseen(observer), None
        try:
            alone(x)
        except QuantizationError as error:  # the others wait for this rank, and must know
            problem = str(error)
        exchange = _exchange_ranges if _is_one_range(alone) else _exchange_states
        exchange(self.ranks, alone, problem)
        remember(observer, *observer._buffers)
        observer._absorb(alone)
        if getattr(alone, "_warned_of_masks", False):
            observer._warned_of_masks = True  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> _Peers:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _nobody, ()


def _nobody() -> None:
    """What stands in a pickled model for the other processes."""


def _unseen(observer: ObserverBase) -> Any:
    """A copy that has seen nothing, with buffers of its own."""
    alone: Any = copy.copy(observer)
    alone._peers = None
    alone._buffers = {name: buffer.clone() for name, buffer in observer._buffers.items() if buffer is not None}
    alone.reset_min_max_vals()
    return alone


def _is_one_range(observer: Any) -> bool:
    kept = observer.state_dict().keys() - {"eps"}
    return bool(kept == _RANGE and observer.min_val.dim() == 0)


def _purpose(observer: Any) -> str:
    return f"to observe the same batch at {observer._where}"


def _exchange_ranges(ranks: Ranks, alone: Any, problem: str | None) -> None:
    """Let `alone` know the range of all ranks. The usual case, in one collective.

    A rank with a problem counts: without any, the third number is 0.
    """
    ends = torch.stack((-alone.min_val, alone.max_val, torch.full_like(alone.min_val, problem is not None)))
    below, above, failed = ranks.largest(ends, _purpose(alone))
    if failed:
        raise CalibrationError(problem or f"{alone._where}: another rank met NaN in this batch; its message says more")
    alone.min_val.copy_(-below)
    alone.max_val.copy_(above)


def _exchange_states(ranks: Ranks, alone: Any, problem: str | None) -> None:
    """Let `alone` know what the observers of all ranks saw, in the order of ranks."""
    buffers = {name: buffer.cpu() for name, buffer in alone._buffers.items()}
    found = [pickle.loads(part) for part in ranks.gather(pickle.dumps((buffers, problem)), _purpose(alone))]
    for rank, (_, trouble) in enumerate(found):
        if trouble is not None:
            raise CalibrationError(f"rank {rank}: {trouble}")
    alone.reset_min_max_vals()
    for other, _ in found:
        part = _unseen(alone)
        part._buffers = other
        alone._merge(part)


@dataclass(frozen=True, eq=False)
class _Agree:
    """After a forward in training: running statistics of batch norms become the mean over processes."""

    ranks: Ranks

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, model: nn.Module, *_: Any) -> None:
        if not model.training:
            return
        found = [one for _, part in graphs(model) for one in _moving(part)]  # type: ignore[arg-type]
        if not found:
            return
        flat = self.ranks.mean(torch.cat([one.flatten() for one in found]), "to agree on the statistics of batch norms")
        for one, agreed in zip(found, flat.split([one.numel() for one in found]), strict=True):
            one.data.copy_(agreed.reshape(one.shape))  # data: autograd holds them, and reads them in evaluation alone

    def __deepcopy__(self, memo: dict[int, Any]) -> _Agree:
        return self


def _moving(gm: GraphModule) -> list[Tensor]:
    """Running statistics that a forward in training changes, each once."""
    if FROZEN_NORMS_KEY in gm.meta:
        return []
    norms = [bind(node) for node in gm.graph.nodes if is_batch_norm(node)]
    nodes = {norm[name]: None for norm in norms for name in ("running_mean", "running_var") if norm[name] is not None}
    return [value for node in nodes if (value := constant(node)) is not None]
