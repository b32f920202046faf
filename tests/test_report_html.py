"""The report in a browser: one file without the network that says what the record says, and whose controls work."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.debug import compare
from pt2e_quant.errors import CaptureError
from pt2e_quant.latency import KernelTime, Profile
from pt2e_quant.report import Report
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.browser import open_browser

SHARP = "<script>alert('x')</script>"
PROFILE = Profile(90.0, (KernelTime("conv", 1, 40.0, ("conv2d",)), KernelTime("linear", 1, 9.0, ("linear",))))
FLOAT_PROFILE = Profile(150.0, (KernelTime("float conv", 2, 120.0, ("conv2d", "conv2d_1")),))
VOID = {"meta", "input", "br", "link", "img"}


class Net(nn.Module):
    """Two convs of different sizes that share a grid, an op without a rule, a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.quiet, self.loud = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        quiet = self.quiet(x)
        loud = 40 * self.loud(x)
        return self.head(torch.sin(torch.cat([quiet, loud], 1)).mean((2, 3)))


class Page(HTMLParser):
    """Tags that are not closed in order, the attributes of all elements, the text outside of scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return "\n".join(self.words)


class Program:
    """A lowered program, as far as a report reads it."""

    def fate(self, node: str) -> str:
        return f"kernel of {node}"

    def sections(self) -> dict[str, list[str]]:
        return {"Kernels": ["conv kernel", "linear kernel"], "Fallbacks": []}

    def __str__(self) -> str:
        return "a program of two kernels"


@pytest.fixture(scope="module")
def made() -> SimpleNamespace:
    torch.manual_seed(0)
    batches = [torch.randn(1, 3, 8, 8) for _ in range(2)]
    exported = torch.export.export(Net().eval(), (batches[0],))
    config = get_symmetric_quantization_config(is_per_channel=True)
    prepared = prepare_pt2e(exported, XNNPACKQuantizer().set_global(config))
    for batch in batches:
        prepared(batch)
    converted = convert_pt2e(prepared)
    return SimpleNamespace(
        measured=explain(prepared, batches), report=explain(converted), comparison=compare(exported, converted, batches)
    )


@pytest.fixture(scope="module")
def html(made) -> str:
    return made.measured.html(made.comparison, Program(), PROFILE, FLOAT_PROFILE)


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


# --- what the file says -----------------------------------------------------------------------------------------------


def test_elements_are_closed_in_order(page):
    assert (page.wrong, page.open) == ([], [])


def test_nothing_is_loaded(html, page):
    """All of plotly is inside, packed; and the browser is told to fetch nothing."""
    assert [attributes for _, attributes in page.elements if {"src", "srcset", "data"} & set(attributes)] == []
    assert all(link["href"].startswith("#") for link in page.all("a"))
    assert page.all("link") == []
    assert "default-src 'none'" in html
    outside_of_plotly = re.sub(r'<script type="text/plain".*?</script>', "", html, flags=re.DOTALL)
    assert re.findall(r"https?://\S+|@import|url\(", outside_of_plotly) == []


def test_it_is_small(html):
    """Of the 5 MB that a ResNet-50 may take, plotly takes 2."""
    assert len(html) < 2.5e6


def test_five_hundred_layers_fit(made):
    """In the 5 MB that the page of a ResNet-50 may take, which has 122."""
    record = made.measured.record
    many = replace(record, decisions=record.decisions * 70, groups=record.groups * 70)
    assert len(many.decisions) > 500
    assert len(Report(many).html()) < 5e6


def test_every_op_is_there_with_its_reason_or_its_rule(page, made):
    for decision in made.measured.record.decisions:
        assert decision.node in page.words
        assert (decision.rule in page.words) if decision.quantized else (decision.reason in page.text)


def test_every_observer_and_what_sharing_costs_is_there(page, made):
    assert {group.observer for group in made.measured.groups} <= set(page.words)
    assert [words for words in page.words if words == "What sharing costs"]
    assert "conv2d_1" in page.text


def test_errors_of_the_comparison_are_there(page, made):
    """Each number that the table of layers has room for, as `Comparison` rounds it."""
    ops = {decision.origin for decision in made.measured.record.decisions}
    for row in made.comparison.nodes:
        if row.node in ops and row.own != float("inf"):
            assert f"{row.own:.1f}" in page.words


def test_the_program_and_its_kernels_are_there(page):
    assert {"a program of two kernels", "kernel of linear", "conv kernel", "Kernels (2)"} <= set(page.words)
    assert "Fallbacks" not in page.text


def test_names_are_text_and_no_markup(made):
    """In tables, and in the plain values that the plots read."""
    record = made.measured.record
    groups = [replace(group, own=tuple(replace(own, tensor=SHARP) for own in group.own)) for group in record.groups]
    decisions = [replace(decision, node=SHARP, module=SHARP, source=SHARP) for decision in record.decisions]
    sharp = Report(replace(record, groups=groups, decisions=decisions)).html()
    assert SHARP not in sharp
    assert Page(sharp).words.count(SHARP) >= 3 * len(decisions)


def test_without_a_comparison_or_a_program_the_page_does_not_speak_of_them(made):
    words = Page(made.report.html()).words
    assert not {"Errors", "Artefact", "became", "own error, dB"} & set(words)


def test_headers_have_a_scope_and_controls_a_label(page):
    assert page.all("html")[0]["lang"] == "en"
    assert all(header.get("scope") in ("col", "row") for header in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert len(page.all("label")) == len(page.all("input")) + len(page.all("select"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link["href"][1:] for link in page.all("a")} <= set(ids)


def test_saving_writes_the_page_too(made, tmp_path):
    *_, page = made.report.save(tmp_path / "net", comparison=made.comparison)
    assert page.name == "net.html"
    assert page.read_text() == made.report.html(made.comparison) + "\n"


def test_without_plotly_saving_writes_the_rest_and_says_so(made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    from pt2e_quant.report.html.page import _plotly

    _plotly.cache_clear()
    files = made.report.save(tmp_path / "net")
    assert [file.name for file in files] == ["net.txt", "net.json", "net.model_explorer.json"]
    assert re.search(r"There is no .*net\.html: .* needs plotly.*pt2e-quant\[report\]", files[0].read_text())
    with pytest.raises(CaptureError, match="needs plotly"):
        made.report.html()


def test_it_says_the_time_of_each_kernel_and_of_the_float_model_beside_it(page):
    assert "Quantized: 90 us a run in 2 kernels" in page.words
    assert "Float model: 150 us a run in 2 kernels" in page.words
    rows = [row for row in page.text.split("\n") if row.strip()]
    start = rows.index("linear", rows.index("Latency by kernel"))
    assert rows[start : start + 5] == ["linear", "9.0", "10.0", "1", "linear"]
    assert "41 lie outside of kernels" in page.text


# --- what a reader sees -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(html, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(html)
    for browser in open_browser():
        browser.open(path)
        browser.wait("document.documentElement.dataset.plots")
        yield browser


@pytest.fixture
def opened(browser):
    """Each test starts with all rows, and leaves an empty console."""
    browser.run("document.getElementById('filter').reset()")
    yield browser
    assert browser.console() == []


def column(browser, number: int) -> list[str]:
    return browser.texts(f"#layers tbody tr > :nth-child({number})")


def test_searching_leaves_the_rows_with_all_words(opened):
    opened.find("#search")[0].send_keys("CONV2D quiet(x)")
    opened.wait("document.getElementById('count').textContent.startsWith('1 of ')")
    assert column(opened, 2) == ["conv2d"]


def test_the_ops_left_in_float_can_be_shown_alone(opened, made):
    opened.find("#show option[value=float]")[0].click()
    opened.wait(f"document.getElementById('count').textContent.startsWith('{len(made.measured.skipped)} of ')")
    assert column(opened, 2) == [decision.node for decision in made.measured.skipped]


def test_a_column_sorts_up_then_down(opened, made):
    header = opened.find("#layers thead th:nth-child(2) button")[0]
    names = sorted(decision.node for decision in made.measured.record.decisions)
    header.click()
    assert column(opened, 2) == names
    header.click()
    assert column(opened, 2) == names[::-1]
    assert opened.find("#layers th[aria-sort=descending]") != []


def test_errors_sort_as_numbers_and_rows_without_one_go_last(opened):
    opened.find("#layers thead th:nth-child(7) button")[0].click()
    shown = column(opened, 7)
    numbers = [float(value) for value in shown if value not in ("", "exact")]
    assert numbers == sorted(numbers)
    assert shown[: len(numbers)] == [value for value in shown if value not in ("", "exact")]


def test_each_plot_draws_a_mark_for_each_tensor(opened, made):
    inexact = [row for row in made.comparison.nodes if row.own != float("inf")]
    assert len(opened.find("#plot-errors .scatterlayer .trace:first-child .point")) == len(inexact)
    ranged = [own for group in made.measured.groups if group.range for own in group.own]
    assert opened.run("return document.querySelectorAll('#plot-ranges .bars .point').length") == len(ranged)


def test_the_histogram_is_that_of_the_chosen_observer_with_the_ends_of_its_grid(opened, made):
    group = next(group for group in made.measured.groups if "linear" in group.members)
    opened.find(f"#observer option[value={group.observer}]")[0].click()
    drawn = "document.getElementById('plot-histogram')"
    opened.wait(f"{drawn}.data[0].y.join() === '{','.join(map(str, group.histogram.counts))}'")
    clips = opened.run(f"return {drawn}.layout.shapes.map((line) => line.x0)")
    assert clips == pytest.approx(group.range)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_no_violation_of_its_default_rules(opened, theme):
    found = importlib.util.find_spec("axe_playwright_python")
    if found is None or found.origin is None:
        pytest.skip("axe-core is not here; it comes with axe-playwright-python, of which this needs the script alone")
    opened.run(f"setTheme('{theme}')")
    opened.run((Path(found.origin).parent / "axe.min.js").read_text())
    violations = opened.driver.execute_async_script("axe.run().then((found) => arguments[0](found.violations))")
    assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in violations] == []


def test_the_theme_changes_with_a_click_for_page_and_plots(opened):
    background = "return getComputedStyle(document.body).backgroundColor"
    paper = "return document.querySelector('#plot-errors .main-svg').style.background"
    before = opened.run(background), opened.run(paper)
    opened.find("#theme")[0].click()
    after = opened.run(background), opened.run(paper)
    assert before[0] != after[0]
    assert before[1] != after[1]
    assert [before[0] in before[1], after[0] in after[1]] == [True, True]


def test_links_of_the_navigation_lead_to_what_they_name(opened):
    for link in opened.find("nav a"):
        link.click()
        target = opened.run("return document.querySelector(location.hash + ' h2').getBoundingClientRect().top")
        assert 0 <= target < 1000
