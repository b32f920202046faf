"""A folder of images as calibration data: read by Pillow, made inputs of the model as the recipe says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..files import open_file
from ..recipes.images import Images

__all__ = ["load_images"]

_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's names, by the number of channels


def load_images(folder: str, inputs: dict[str, Tensor], images: Images) -> list[dict[str, Tensor]]:
    """Batches of the images in a folder and in those inside it, in the order of their paths.

    Args:
        folder: other files in it are left out.
        inputs: examples by name: one of them, [N, C, H, W] in floating point, with C of 1 (grey), 3 (RGB) or 4 (RGBA).
        images: how files become inputs.

    Raises:
        CalibrationError: the model takes something else, there is no image, their number is no multiple of N, or a file
            is damaged.
    """
    (name, example), *others = inputs.items() or [("nothing", torch.empty(0))]
    if others or example.dim() != 4 or not example.is_floating_point() or example.shape[1] not in _MODES:
        taken = ", ".join(f"{key}: {value.dtype} {list(value.shape)}" for key, value in inputs.items())
        raise CalibrationError(
            f"{folder}: images become one input [N, C, H, W] in floating point with 1, 3 or 4 channels; the model "
            f"takes {taken}. Pass --data inputs.npz"
        )
    size, channels, height, width = example.shape
    scaled = _Scaled.of(images, channels, folder)
    paths = _chosen(folder, images.count - images.count % size or size)
    if len(paths) % size:
        raise CalibrationError(
            f"{folder}: {len(paths)} images are no multiple of the model's batch of {size}; "
            f"export it with a batch of 1, or remove {len(paths) % size}"
        )
    read = [scaled(_pixels(path, images.resize, (width, height), _MODES[channels])).to(example.dtype) for path in paths]
    return [{name: torch.stack(read[first : first + size])} for first in range(0, len(read), size)]


class _Scaled:
    """Pixels [H, W, C] of uint8 to values [C, H, W] of float32."""

    def __init__(self, scale: float, mean: Tensor, std: Tensor) -> None:
        self._scale, self._mean, self._std = scale, mean, std

    @classmethod
    def of(cls, images: Images, channels: int, folder: str) -> _Scaled:
        for what, values in (("mean", images.mean), ("std", images.std)):
            if len(values) not in (1, channels):
                raise CalibrationError(
                    f"{folder}: the recipe's {what} has {len(values)} numbers for {channels} channels"
                )
        return cls(images.scale, torch.tensor(images.mean), torch.tensor(images.std))

    def __call__(self, pixels: Tensor) -> Tensor:
        return ((pixels * self._scale - self._mean) / self._std).permute(2, 0, 1)


def _chosen(folder: str, most: int) -> list[Path]:
    found = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not found:
        raise CalibrationError(f"{folder}: there is no image in this folder ({', '.join(sorted(_SUFFIXES))})")
    count = min(most, len(found))
    return [found[index * len(found) // count] for index in range(count)]


def _pixels(path: Path, resize: int | None, size: tuple[int, int], mode: str) -> Tensor:
    """[H, W, C], uint8; upright, as the camera noted."""
    try:
        import numpy
        from PIL import Image, ImageOps
    except ImportError as error:
        raise CalibrationError('images need Pillow: pip install "pt2e-quant[cli]"') from error
    try:
        with open_file(path) as file, Image.open(file) as image:
            upright = ImageOps.exif_transpose(image).convert(mode)
            cut = _middle(upright, resize, size)
    except Exception as error:
        raise CalibrationError(f"{path}: this image cannot be read: {error}") from error
    return torch.from_numpy(numpy.array(cut)).reshape(size[1], size[0], -1)


def _middle(image: Any, resize: int | None, size: tuple[int, int]) -> Any:
    """Resized so that the shorter side is `resize`, or further where `size` (width, height) would not fit in."""
    from PIL import Image

    fits = max(size[0] / image.width, size[1] / image.height)
    factor = fits if resize is None else max(fits, resize / min(image.size))
    wide, high = (max(round(one * factor), least) for one, least in zip(image.size, size, strict=True))
    left, top = (wide - size[0]) // 2, (high - size[1]) // 2
    resized = image.resize((wide, high), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + size[0], top + size[1]))
