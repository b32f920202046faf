"""Write docs/images/ from the demo's report in a headless Chromium: python -m docs.make_screenshots"""

from __future__ import annotations

import tempfile
from pathlib import Path

from demo.digits import main as run_demo
from tests.browser import open_browser

__all__ = ["main"]

IMAGES = Path(__file__).with_name("images")


def main() -> None:
    """The top of the page, and the section with a histogram."""
    IMAGES.mkdir(exist_ok=True)
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
