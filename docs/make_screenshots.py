"""Write docs/images/: the demo's report in a headless Chromium, and plots of tutorials 7 and 8.

python -m docs.make_screenshots
"""

from __future__ import annotations

import runpy
import shutil
import tempfile
from pathlib import Path
from unittest import mock

from demo.digits import main as run_demo
from tests.browser import open_browser

__all__ = ["main"]

IMAGES = Path(__file__).with_name("images")
TUTORIALS = Path(__file__).parents[1] / "tutorials"


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    sensitivity()
    training()
    report()


def sensitivity() -> None:
    """What quantizing each layer costs the outputs of tutorial 7's net, which has one bad layer."""
    axes = runpy.run_path(str(TUTORIALS / "07_find_the_bad_layer.py"))["effects"].plot()
    axes.figure.savefig(IMAGES / "sensitivity.png", dpi=90, bbox_inches="tight")


def training() -> None:
    """Accuracy by epoch in tutorial 8, beside what calibration alone gives."""
    with tempfile.TemporaryDirectory() as folder, mock.patch("tempfile.gettempdir", return_value=folder):
        runpy.run_path(str(TUTORIALS / "08_train_for_quantization.py"), run_name="__main__")
        shutil.copy(Path(folder) / "train_for_quantization.png", IMAGES / "training.png")


def report() -> None:
    """The top of the page, and the section with a histogram."""
    with tempfile.TemporaryDirectory() as folder:
        run_demo(["--out", folder])
        for browser in open_browser(width=1700, height=1400):
            browser.open(Path(folder) / "report.html")
            browser.wait("document.documentElement.dataset.plots")
            browser.driver.save_screenshot(str(IMAGES / "report.png"))
            browser.find("#observer option:nth-child(3)")[0].click()
            browser.find("#histograms")[0].screenshot(str(IMAGES / "histogram.png"))


if __name__ == "__main__":
    main()
