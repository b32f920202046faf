"""What the repository says of itself is true: documents run, names exist, pins agree, files keep their shape."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points, metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
LIBRARY = sorted(path for room in ("pt2e_quant", "quantizers") for path in (ROOT / room).rglob("*.py"))
ROOMS = ("pt2e_quant", "quantizers", "demo", "docs", "tutorials", "tests", "benchmarks", "requirements", ".ci")
OURS = sorted(
    path
    for room in ROOMS
    for path in (ROOT / room).rglob("*")
    if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".png"
) + [path for path in ROOT.iterdir() if path.suffix in {".md", ".toml"} or path.name in {"Makefile", "LICENSE"}]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LONGEST_FUNCTION, LONGEST_FILE = 50, 400  # lines; a file's without prose, blank lines and comments


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def nodes_of(path: Path) -> list[ast.AST]:
    """All of the syntax tree of a file, in the order of `ast.walk`."""
    return list(ast.walk(ast.parse(path.read_text())))


def offenders(offences: Callable[[Path], object], files: Iterable[Path] = LIBRARY) -> dict[str, object]:
    """What `offences` finds in each file; the files where it finds nothing are left out."""
    found = {named(path): offences(path) for path in files}
    return {name: what for name, what in found.items() if what}


def lines_of_code(path: Path) -> int:
    """Lines that are neither blank, nor a comment, nor part of a docstring."""
    strings = [
        node
        for node in nodes_of(path)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    prose = {line for node in strings for line in range(node.lineno, node.end_lineno + 1)}
    lines = enumerate(path.read_text().splitlines(), 1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and at not in prose for at, line in lines)


def test_a_file_says_what_it_is_for_and_what_it_offers():
    def wrong(path: Path) -> list[str]:
        module = importlib.import_module(module_name(path))
        silent = [] if module.__doc__ else ["no docstring"]
        if len(ast.parse(path.read_text()).body) == 1:
            return silent  # a package that is its docstring offers its modules
        twice = [name for name, times in Counter(module.__all__).items() if times > 1]
        return silent + [name for name in module.__all__ if not hasattr(module, name)] + twice

    assert offenders(wrong) == {}


def test_a_function_can_be_read_in_one_sitting():
    def long(path: Path) -> list[str]:
        functions = [node for node in nodes_of(path) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        lines = [(function.name, function.end_lineno - function.lineno + 1) for function in functions]
        return [f"{name}: {count} lines" for name, count in lines if count > LONGEST_FUNCTION]

    assert offenders(long) == {}


def test_a_file_can_be_read_in_one_sitting():
    lines = {named(path): lines_of_code(path) for path in LIBRARY}
    assert {name: count for name, count in lines.items() if count > LONGEST_FILE} == {}


def test_no_backend_walks_a_graph():
    def walks(path: Path) -> list[int]:
        return [node.lineno for node in nodes_of(path) if getattr(node, "attr", "") in ("nodes", "find_nodes")]

    assert offenders(walks, [path for path in LIBRARY if path.parts[-2] == "quantizers"]) == {}


def test_everything_public_has_a_docstring():
    package = importlib.import_module("pt2e_quant")
    silent = [
        name for name in package.__all__ if callable(getattr(package, name)) and not getattr(package, name).__doc__
    ]
    assert silent == []


def test_the_core_needs_torch_alone():
    """The extras are not imported by the framework or by a quantizer, only by the lowering that they are for."""
    extras = ("executorch", "torchao", "rich", "typer", "transformers", "sklearn")
    code = f"import sys, pt2e_quant, quantizers.xnnpack; print(sorted(set({extras}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if "```python" in path.read_text()], ids=named)
def test_the_code_of_a_document_runs(document, tmp_path, monkeypatch):
    """All blocks, one after the other in one namespace, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": document.stem}
    for block in re.findall(r"^```python\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL):
        source = tmp_path / "block.py"  # where reports look for the lines of a model
        source.write_text(block)
        exec(compile(block, str(source), "exec"), namespace)


def test_the_commands_of_a_document_can_be_given():
    """Targets of the Makefile, extras of the package, the pinned torch: what stands in a block of commands."""
    makefile = (ROOT / "Makefile").read_text()
    allowed = {f"make {target}" for target in re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)}
    allowed |= {f'pip install -e ".[{extra}]"' for extra in metadata("pt2e-quant").get_all("Provides-Extra")}
    allowed |= {f"pip install {torch}" for torch in re.findall(r"torch==[\d.]+", makefile)}
    blocks = [
        block for path in DOCUMENTS for block in re.findall(r"^```sh\n(.*?)^```", path.read_text(), re.M | re.DOTALL)
    ]
    commands = [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]
    assert commands
    assert set(commands) <= allowed


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_paths_and_targets_that_a_document_names_exist(document):
    text = document.read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in link]
    assert [link for link in links if not (document.parent / link).exists()] == []
    paths = re.findall(r"`((?:pt2e_quant|quantizers|demo|tests|tutorials|benchmarks|requirements)/[\w./]*)`", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", text)) <= targets


def test_the_index_of_the_documentation_lists_every_page_and_tutorial():
    linked = re.findall(r"\]\(([^)#\s]+)\)", (ROOT / "docs/README.md").read_text())
    listed = {(ROOT / "docs" / link).resolve() for link in linked}
    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / "tutorials").glob("*.py")]
    assert [named(page) for page in pages if page not in listed] == ["docs/README.md"]


def test_tutorials_are_numbered_without_gaps():
    """And each calls itself by its number, in its first line, and by its file."""
    tutorials = sorted((ROOT / "tutorials").glob("*.py"))
    assert [path.name[:3] for path in tutorials] == [f"{number:02}_" for number in range(1, len(tutorials) + 1)]
    for number, path in enumerate(tutorials, 1):
        head = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert head.startswith(f"Tutorial {number}: ")
        assert f"python tutorials/{path.name}" in head


def test_the_changelog_opens_with_this_version():
    assert f"## {metadata('pt2e-quant')['Version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_a_file_names_no_place_of_its_author():
    """Neither folders of somebody's machine nor hosts that a reader need not trust."""
    trusted = {"github.com", "pytorch.org", "docs.pytorch.org", "arxiv.org", "opensource.org"}

    def places(path: Path) -> list[str]:
        text = path.read_text()
        folders = re.findall(r"(?<![\w./\]}*])/(?:home|root|opt|work|mnt)/\w+", text)
        hosts = {host.lower().removeprefix("www.") for host in re.findall(r"https?://([\w.-]+)", text)}
        return folders + sorted(hosts - trusted)

    assert offenders(places, OURS) == {}


def test_what_is_installed_is_what_is_pinned():
    pins = [
        Requirement(line) for line in (ROOT / "requirements/pins.txt").read_text().splitlines() if line[:1].isalnum()
    ]
    assert all(re.fullmatch(r"==[^,*]+", str(pin.specifier)) for pin in pins)
    wanted = [Requirement(text) for text in metadata("pt2e-quant").get_all("Requires-Dist")]
    versions = {pin.name.lower().replace("_", "-"): next(iter(pin.specifier)).version for pin in pins}
    outside = [
        str(need)
        for need in wanted
        if need.name != "pt2e-quant" and Version(versions[need.name.lower()]) not in need.specifier
    ]
    assert outside == []
    assert f"torch=={versions['torch']} " in (ROOT / "Makefile").read_text()


def test_quantizers_are_found_through_their_entry_point():
    found = {entry.name: entry.load() for entry in entry_points(group="pt2e_quant.quantizers")}
    quantizer = importlib.import_module("pt2e_quant.quantizer").Quantizer
    assert found
    assert all(issubclass(kind, quantizer) for kind in found.values())


def test_each_backend_has_an_entry_point_in_pyproject():
    section = (
        (ROOT / "pyproject.toml").read_text().split('[project.entry-points."pt2e_quant.quantizers"]')[1].split("[")[0]
    )
    named_there = dict(re.findall(r'^(\w+) = "quantizers\.\1:(\w+)"$', section, re.MULTILINE))
    shared = {"__init__", "common", "decoder", "inductor_quantizer", "inductor_rules"}  # decoder: a recipe of several
    assert set(named_there) == {path.stem for path in (ROOT / "quantizers").glob("*.py")} - shared
    for module, name in named_there.items():
        assert hasattr(importlib.import_module(f"quantizers.{module}"), name)


def test_the_library_has_no_bare_assert():
    """Users' item 39: no `assert` can be reached from user input: there is none."""

    def asserts(path: Path) -> list[int]:
        return [node.lineno for node in nodes_of(path) if isinstance(node, ast.Assert)]

    assert offenders(asserts) == {}


# Passes and the integer reference emit operators, the writer spells them.
MAY_NAME_OPERATORS = ("ops.py", "limits.py", "write.py", "requantization.py")  # the last is the integer reference's
ROOMS_THAT_EMIT = {"passes", "representation", "quantizers"}


def test_lists_of_operators_stand_where_they_belong():
    """A fact about operators stands once: elsewhere a family of ops.py or a limit of a backend is asked."""

    def listed(path: Path) -> set[str]:
        if path.name in MAY_NAME_OPERATORS or path.parent.name in ROOMS_THAT_EMIT:
            return set()
        attributes = [node for node in nodes_of(path) if isinstance(node, ast.Attribute)]
        operators = {node.attr for node in attributes if ast.unparse(node.value).rpartition(".")[2] == "aten"}
        return operators if len(operators) > 3 else set()

    assert offenders(listed) == {}
