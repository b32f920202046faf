"""Switches of a whole model in training: what is observed, what is rounded, which statistics batch norms use.

Each says how many modules it switched, and raises where that would be none. They are hooks for a loop of the user's:

    disable_observer(prepared)     # ranges stay as they are
    freeze_bn_stats(prepared)      # batch norms use their running statistics, and leave them as they are

Before this: `prepare_qat_pt2e`. After it: `convert_pt2e`, which takes a model in any state of its switches.
"""

from __future__ import annotations

from torch import nn

from ...checks import checked
from ...errors import TargetingError
from ...fake_quantize import toggle_fake_quantizers, toggle_range_learning
from ...graph.module import ExportedModule
from ...meta import FROZEN_NORMS_KEY
from ...passes.fold_batch_norm import is_batch_norm

__all__ = [
    "disable_fake_quant",
    "disable_observer",
    "disable_range_learning",
    "enable_fake_quant",
    "enable_observer",
    "enable_range_learning",
    "freeze_bn_stats",
    "update_bn_stats",
]


@checked(TargetingError)
def enable_observer(model: nn.Module) -> int:
    """Let the ranges of all fake quantizers follow the data; how many there are.

    Raises:
        TargetingError: there is none.
    """
    return toggle_fake_quantizers(model, observer=True)


@checked(TargetingError)
def disable_observer(model: nn.Module) -> int:
    """Keep the ranges of all fake quantizers as they are; how many there are.

    Raises:
        TargetingError: there is none.
    """
    return toggle_fake_quantizers(model, observer=False)


@checked(TargetingError)
def enable_fake_quant(model: nn.Module) -> int:
    """Let all fake quantizers round; how many there are.

    Raises:
        TargetingError: there is none.
    """
    return toggle_fake_quantizers(model, fake_quant=True)


@checked(TargetingError)
def disable_fake_quant(model: nn.Module) -> int:
    """Let all fake quantizers pass values on as they are; how many there are.

    Raises:
        TargetingError: there is none.
    """
    return toggle_fake_quantizers(model, fake_quant=False)


@checked(TargetingError)
def enable_range_learning(model: nn.Module) -> int:
    """Train the scales and zero points that are parameters, whose observers then rest; how many modules have them.

    Raises:
        TargetingError: there is none.
    """
    return toggle_range_learning(model, True)


@checked(TargetingError)
def disable_range_learning(model: nn.Module) -> int:
    """Leave scales and zero points where training has brought them; how many modules have them.

    Raises:
        TargetingError: there is none.
    """
    return toggle_range_learning(model, False)


@checked(TargetingError)
def freeze_bn_stats(model: nn.Module) -> int:
    """Let batch norms use their running statistics, and leave these as they are, in training too; how many there are.

    Gamma and beta go on training. train() and eval() leave them frozen, copies of the model are frozen as well.

    Raises:
        TargetingError: there is none.
    """
    return _freeze(model, True)


@checked(TargetingError)
def update_bn_stats(model: nn.Module) -> int:
    """Undo `freeze_bn_stats`; how many batch norms there are.

    Raises:
        TargetingError: there is none.
    """
    return _freeze(model, False)


def _freeze(model: nn.Module, frozen: bool) -> int:
    parts = [module for module in model.modules() if isinstance(module, ExportedModule)]
    counts = [sum(map(is_batch_norm, part.graph.nodes)) for part in parts]
    if not sum(counts):
        raise TargetingError(
            f"{type(model).__name__} holds no batch norm of a prepared model, so there is nothing to freeze or to "
            "update. prepare_pt2e folds batch norms, and so does convert_pt2e; prepare_qat_pt2e keeps them."
        )
    for part in parts:
        if frozen:
            part.meta[FROZEN_NORMS_KEY] = True
        else:
            part.meta.pop(FROZEN_NORMS_KEY, None)
        part.train(part.training)
    return sum(counts)
