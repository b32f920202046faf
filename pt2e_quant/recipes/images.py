"""Images: how files of images become inputs of a model; a part of a recipe. `cli/images.py` reads the files."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..checks import check_fields
from ..errors import RecipeError

__all__ = ["Images"]


@dataclass(frozen=True, kw_only=True)
class Images:
    """From the pixels of a file, 0 to 255, to an input [N, C, H, W] of the model.

    The shorter side is resized (bilinear, antialiased) and the middle of H x W cut out; then each channel becomes
    (pixel * scale - mean) / std.

    Args:
        resize: the shorter side, in pixels; None resizes just so far that H x W fits in.
        scale: of pixels.
        mean, std: in scaled units: one number for each channel, or one for all.
        count: how many images are taken at most, spread evenly over the names in their order.

    Raises:
        RecipeError: a value is of another kind, infinite, or not above zero where it must be.
    """

    resize: int | None = None
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    count: int = 256

    def __post_init__(self) -> None:
        check_fields(self, RecipeError)
        if not all(map(math.isfinite, (self.scale, *self.mean, *self.std))):
            raise RecipeError("Images: scale, mean and std must be finite")
        if not self.mean or not self.std or min(self.std) <= 0 or self.scale <= 0:
            raise RecipeError("Images: mean and std need a number each; scale and std must be above 0")
        if self.count < 1 or (self.resize is not None and self.resize < 1):
            raise RecipeError("Images: count and resize must be at least 1")
