"""A headless Chromium for tests, with what it wrote to its console; without one they are skipped with that reason."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

__all__ = ["Browser", "open_browser"]

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")


class Browser:
    """A page under a user's hands."""

    def __init__(self, driver) -> None:
        self.driver = driver

    def open(self, path) -> None:
        self.driver.get(path.as_uri())

    def run(self, script: str):
        """What JavaScript returns."""
        return self.driver.execute_script(script)

    def find(self, selector: str) -> list:
        """Elements by their CSS selector, those that are seen."""
        return [one for one in self.driver.find_elements("css selector", selector) if one.is_displayed()]

    def texts(self, selector: str) -> list[str]:
        """What elements say, even where one has to scroll to read it."""
        return [one.text for one in self.find(selector)]

    def wait(self, condition: str) -> None:
        """Until a JavaScript expression is true; 20 s on a machine that is busy with other tests."""
        from selenium.webdriver.support.wait import WebDriverWait

        WebDriverWait(self.driver, 20).until(lambda _: self.run(f"return Boolean({condition})"))

    def console(self) -> list[str]:
        """What was written there since it was last asked."""
        return [entry["message"] for entry in self.driver.get_log("browser")]


def open_browser(width: int = 1400, height: int = 1000) -> Iterator[Browser]:
    """One browser, closed in the end."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("there is no Chromium with its driver here (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},{height}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
