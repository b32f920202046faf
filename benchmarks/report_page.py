"""The page of a ResNet-50 in a headless Chromium: bytes, seconds until it is drawn, barriers that axe-core finds.

    python -m benchmarks.report_page [--repeat 5]

The model is quantized for XNNPACK, lowered, run and profiled beside its float form, so the page has all of its parts.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.models import resnet50
from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.debug import compare
from pt2e_quant.lowering.executorch import lower_to_executorch
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.browser import Browser, open_browser

__all__ = ["main"]


def write_page(path: Path) -> None:
    model = resnet50()
    exported = torch.export.export(model.module, model.inputs)
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(exported, quantizer)
    with torch.no_grad():
        prepared(*model.inputs)
        measured = explain(prepared, [model.inputs])
        converted = convert_pt2e(prepared)
        comparison = compare(exported, converted, [model.inputs])
        program = lower_to_executorch(converted)
        in_float = lower_to_executorch(exported)
    profiles = program.profile(*model.inputs), in_float.profile(*model.inputs)
    path.write_text(measured.html(comparison, program, *profiles))


def seconds_to_draw(browser: Browser, path: Path) -> float:
    """From the request until all plots are drawn."""
    start = time.perf_counter()
    browser.open(path)
    browser.wait("document.documentElement.dataset.plots")
    return time.perf_counter() - start


def violations(browser: Browser) -> list[str]:
    found = importlib.util.find_spec("axe_playwright_python")
    if found is None or found.origin is None:
        return ["axe-core is not here"]
    browser.run((Path(found.origin).parent / "axe.min.js").read_text())
    names: list[str] = browser.driver.execute_async_script(
        "axe.run().then((found) => arguments[0](found.violations.map((one) => one.id)))"
    )
    return names


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report_page")
    parser.add_argument("--repeat", type=int, default=5)
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.html"
        write_page(path)
        print(f"page of a ResNet-50: {path.stat().st_size / 1e6:.2f} MB")
        for browser in open_browser():
            times = [seconds_to_draw(browser, path) for _ in range(chosen.repeat)]
            print(f"drawn after {statistics.median(times):.2f} s, median of {chosen.repeat}; worst {max(times):.2f} s")
            print(f"violations of axe-core's default rules: {violations(browser) or 'none'}")
            print(f"console: {browser.console() or 'empty'}")


if __name__ == "__main__":
    main()
