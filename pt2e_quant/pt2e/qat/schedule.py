"""QATSchedule: which part of training begins at which step, as a hook for a loop of the user's.

Before this: `switches`, which it turns. After it: `convert_pt2e`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ...checks import checked
from ...errors import TargetingError
from ...fake_quantize import LearnableFakeQuantize
from .switches import (
    disable_fake_quant,
    disable_observer,
    disable_range_learning,
    enable_fake_quant,
    enable_observer,
    enable_range_learning,
    freeze_bn_stats,
    update_bn_stats,
)

__all__ = ["QATSchedule"]


class QATSchedule:
    """Observe, then round, then freeze what the integers depend on.

        schedule = QATSchedule(prepared, round_at=100, freeze_norms_at=800, freeze_ranges_at=900)
        for batch in loader:
            ...
            optimizer.step()
            schedule.step()

    Until `round_at`, values pass as they are and ranges follow the data. From there on they are rounded, and scales
    that are parameters are learned. It turns switches where a part begins, and touches none in between.

    Args:
        model: what `prepare_qat_pt2e` returned, or a module that holds it.
        round_at: steps that only observe; with 0, observers stay as they are: resting, after `calibration=`.
        freeze_norms_at: batch norms use their running statistics from this step on; None for never.
        freeze_ranges_at: ranges, learned ones too, stay as they are from this step on; None for never.

    Raises:
        TargetingError: the model has no fake quantizer; or no batch norm, and `freeze_norms_at` is given; or ranges
            would be frozen before anything is rounded.
    """

    @checked(TargetingError)
    def __init__(
        self,
        model: nn.Module,
        *,
        round_at: int = 0,
        freeze_norms_at: int | None = None,
        freeze_ranges_at: int | None = None,
    ) -> None:
        if round_at < 0 or not all(at is None or at >= round_at for at in (freeze_norms_at, freeze_ranges_at)):
            raise TargetingError(
                f"QATSchedule: parts follow one another, 0 <= round_at <= freeze_..._at, got {round_at=}, "
                f"{freeze_norms_at=}, {freeze_ranges_at=}"
            )
        self._model = model
        self._round_at = round_at
        self._freeze_norms_at = freeze_norms_at
        self._freeze_ranges_at = freeze_ranges_at
        self._learns = any(isinstance(module, LearnableFakeQuantize) for module in model.modules())
        self._at = 0
        self._begin()

    @property
    def at(self) -> int:
        """Steps that were made."""
        return self._at

    def step(self) -> None:
        """Count one step of the optimizer; to be called after it."""
        self._at += 1
        if self._at in (self._round_at, self._freeze_norms_at, self._freeze_ranges_at):
            self._begin()

    def state_dict(self) -> dict[str, Any]:
        """The number of steps. Switches of fake quantizers are buffers of the model, in its own state dict."""
        return {"at": self._at}

    @checked(TargetingError)
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, with the switches as they are to be then. Load the model's state dict first.

        Raises:
            TargetingError: this is no state of a schedule.
        """
        at = state.get("at")
        if set(state) != {"at"} or not isinstance(at, int) or at < 0:
            raise TargetingError(f"QATSchedule.load_state_dict takes what state_dict() returned, got {state}")
        self._at = at
        self._begin()

    def _begin(self) -> None:
        """Turn the switches to where they belong now; those that do not change may be turned again."""
        rounds = self._at >= self._round_at
        (enable_fake_quant if rounds else disable_fake_quant)(self._model)
        if not rounds:
            enable_observer(self._model)
        elif _reached(self._at, self._freeze_ranges_at):
            disable_observer(self._model)
        if self._learns and rounds:
            learn = not _reached(self._at, self._freeze_ranges_at)
            (enable_range_learning if learn else disable_range_learning)(self._model)
        if self._freeze_norms_at is not None:
            (freeze_bn_stats if _reached(self._at, self._freeze_norms_at) else update_bn_stats)(self._model)


def _reached(at: int, step: int | None) -> bool:
    return step is not None and at >= step
