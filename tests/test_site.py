"""The documentation site: everything that there is to read stands in its navigation, and every page has its source."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from docs import site_pages

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
NAV = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
PAGES = site_pages.named_in(NAV)


def rendered(page: str, markdown: str) -> str:
    file = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    return site_pages.on_page_markdown(markdown, file, {"nav": NAV})


def test_every_document_and_tutorial_stands_in_the_navigation_once():
    shown = [site_pages.source(page) for page in PAGES if not page.startswith("api/")]
    files = [*ROOT.glob("docs/*.md"), *ROOT.glob("tutorials/*.py")]
    files += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    assert sorted(shown) == sorted(files)


def test_pages_of_reference_are_modules_that_list_what_they_offer():
    modules = [page.removeprefix("api/").removesuffix(".md") for page in PAGES if page.startswith("api/")]
    assert all(importlib.import_module(module).__all__ for module in modules)


def test_public_names_that_are_modules_too_are_found_where_they_are_defined():
    assert site_pages.hidden("pt2e_quant.report") == ["pt2e_quant.report.explain.explain"]
    for module in ("pt2e_quant", "pt2e_quant.debug", "pt2e_quant.quantizer"):
        for name in site_pages.hidden(module):
            origin, _, leaf = name.rpartition(".")
            assert getattr(importlib.import_module(origin), leaf) is getattr(importlib.import_module(module), leaf)


@pytest.mark.parametrize(
    ("page", "link", "seen"),
    [
        (
            "reports.md",
            "[t](../tutorials/03_why_was_this_not_quantized.py)",
            "[t](tutorials/03_why_was_this_not_quantized.md)",
        ),
        ("reports.md", "[d](debugging.md#ranks)", "[d](debugging.md#ranks)"),
        ("README.md", "[r](../README.md)", "[r](start.md)"),
        ("start.md", "[d](docs/reports.md)", "[d](reports.md)"),
        ("start.md", "[l](LICENSE)", "l"),
        ("start.md", "[gone](docs/gone.pdf)", "[gone](gone.pdf)"),
    ],
    ids=["tutorial", "section", "root", "docs", "no page", "no file"],
)
def test_links_between_files_lead_to_pages(page, link, seen):
    """Whether a page of docs/ is there is for the strict build to say."""
    assert rendered(page, f"see {link}.") == f"see {seen}."


def test_a_tutorial_is_its_head_as_text_and_its_code():
    page = site_pages.made("tutorials/03_why_was_this_not_quantized.md")
    assert page.startswith("# Tutorial 3: ")
    code = page.split("```python\n")[1].removesuffix("\n```\n")
    assert code in site_pages.source("tutorials/03_why_was_this_not_quantized.md").read_text()
    compile(code, "tutorial", "exec")
