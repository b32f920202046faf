"""A folder of images as data: which files, in which order, and what becomes of a pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pt2e_quant.cli.images import load_images
from pt2e_quant.errors import CalibrationError, RecipeError
from pt2e_quant.recipes.images import Images

RGB = {"x": torch.zeros(1, 3, 4, 4)}
GREY = {"x": torch.zeros(1, 1, 4, 4)}


def paint(path, pixels) -> None:
    """A file without loss, of rows of grey values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(pixels, np.uint8)).save(path)


def test_a_pixel_is_scaled_then_shifted_and_divided_by_channel(tmp_path):
    Image.new("RGB", (4, 4), (255, 51, 0)).save(tmp_path / "a.png")
    images = Images(mean=(0.5, 0.1, 0.25), std=(0.5, 0.1, 0.25))
    ((batch),) = load_images(str(tmp_path), RGB, images)
    assert batch["x"].shape == (1, 3, 4, 4)
    # (255/255 - 0.5)/0.5, (51/255 - 0.1)/0.1, (0 - 0.25)/0.25, each rounded a few times in float32
    torch.testing.assert_close(batch["x"][0, :, 0, 0], torch.tensor([1.0, 1.0, -1.0]), rtol=1e-6, atol=0)


def test_the_middle_is_cut_out(tmp_path):
    paint(tmp_path / "a.png", [[0, 0, 1, 2, 3, 4, 0, 0]] * 4)
    ((batch),) = load_images(str(tmp_path), GREY, Images(scale=1.0))
    assert batch["x"][0, 0, 0].tolist() == [1, 2, 3, 4]


def test_a_small_image_grows_until_it_covers_the_input(tmp_path):
    paint(tmp_path / "a.png", [[7, 7], [7, 7]])
    ((batch),) = load_images(str(tmp_path), GREY, Images(scale=1.0))
    assert batch["x"].unique().tolist() == [7]


def test_resize_is_the_shorter_side_before_the_cut(tmp_path):
    pixels = np.zeros((16, 32), np.uint8)
    pixels[4:12, 12:20] = 9  # the middle half of the shorter side, which 4 of 8 pixels are
    paint(tmp_path / "a.png", pixels)
    ((cut),) = load_images(str(tmp_path), GREY, Images(scale=1.0, resize=8))
    assert cut["x"][0, 0, 1:3, 1:3].unique().tolist() == [9]
    ((whole),) = load_images(str(tmp_path), GREY, Images(scale=1.0))
    assert whole["x"][0, 0, 0].max() < 9


def test_folders_inside_count_and_names_give_the_order(tmp_path):
    for index, name in enumerate(["b/1.png", "a/2.png", "a/1.PNG"]):
        paint(tmp_path / name, np.full((4, 4), index))
    (tmp_path / "notes.txt").write_text("no image")
    found = load_images(str(tmp_path), GREY, Images(scale=1.0))
    assert [int(batch["x"][0, 0, 0, 0]) for batch in found] == [2, 1, 0]


def test_a_count_is_spread_over_all_and_fills_batches(tmp_path):
    for index in range(8):
        paint(tmp_path / f"{index}.png", np.full((4, 4), index))
    two = {"x": torch.zeros(2, 1, 4, 4)}
    found = load_images(str(tmp_path), two, Images(scale=1.0, count=5))
    assert [batch["x"][:, 0, 0, 0].tolist() for batch in found] == [[0, 2], [4, 6]]


@pytest.mark.parametrize(
    ("inputs", "images", "message"),
    [
        ({"x": torch.zeros(1, 10)}, Images(), r"images become one input \[N, C, H, W\].*torch.float32 \[1, 10\]"),
        ({"x": torch.zeros(1, 5, 4, 4)}, Images(), "1, 3 or 4 channels"),
        (RGB | {"ids": torch.zeros(1)}, Images(), "one input"),
        ({"x": torch.zeros(2, 3, 4, 4)}, Images(), "1 images are no multiple of the model's batch of 2"),
        (RGB, Images(mean=(0.5, 0.5)), "the recipe's mean has 2 numbers for 3 channels"),
    ],
)
def test_what_no_image_can_be_is_said(inputs, images, message, tmp_path):
    paint(tmp_path / "a.png", np.zeros((4, 4)))
    with pytest.raises(CalibrationError, match=message):
        load_images(str(tmp_path), inputs, images)


def test_a_damaged_image_is_named(tmp_path):
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    with pytest.raises(CalibrationError, match=r"cut\.png: this image cannot be read"):
        load_images(str(tmp_path), RGB, Images())


def test_a_folder_without_images_is_named(tmp_path):
    with pytest.raises(CalibrationError, match="there is no image in this folder"):
        load_images(str(tmp_path), RGB, Images())


@pytest.mark.parametrize(
    "values", [{"std": (0.0,)}, {"mean": ()}, {"scale": float("inf")}, {"count": 0}, {"resize": 0}, {"mean": 0.5}]
)
def test_a_preprocessing_that_cannot_be_is_refused(values):
    with pytest.raises(RecipeError, match="Images"):
        Images(**values)
