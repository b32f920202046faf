"""Pages of the documentation site that are not in docs/: hooks of mkdocs, which `make docs` runs.

The README, CONTRIBUTING and CHANGELOG, the tutorials, and a page of reference for each module that mkdocs.yml names.
Links between files of the repository become links between pages.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from typing import Any

__all__ = ["on_files", "on_page_markdown"]

ROOT = Path(__file__).parents[1]
FROM_ROOT = {"start.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
LINK = re.compile(r"\[([^\]]*)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made."""
    from mkdocs.structure.files import File

    for page in named_in(config["nav"]):
        if (content := made(page)) is not None:
            files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """A link to another file of the repository leads to its page; one to a file without a page is its text alone."""
    here = page.file.src_uri
    origin = ROOT / FROM_ROOT.get(here, f"docs/{here}")
    pages = {source(name): name for name in named_in(config["nav"])}

    def to_page(link: re.Match[str]) -> str:
        text, target, place = link[1], (origin.parent / link[2]).resolve(), link[3] or ""
        if target not in pages and ROOT / "docs" not in target.parents:
            return text if target.exists() else link[0]
        page = pages.get(target) or os.path.relpath(target, ROOT / "docs")
        return f"[{text}]({os.path.relpath(page, Path(here).parent)}{place})"

    return LINK.sub(to_page, markdown)


def named_in(nav: Any) -> list[str]:
    """The pages of a navigation, in order."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [name for part in parts for name in named_in(part)]


def source(page: str) -> Path:
    """The file of the repository that a page shows."""
    if page.startswith("tutorials/"):
        return (ROOT / page).with_suffix(".py")
    return ROOT / FROM_ROOT.get(page, f"docs/{page}")


def made(page: str) -> str | None:
    """The Markdown of a page that is not in docs/, None of one that is."""
    if page in FROM_ROOT:
        return source(page).read_text()
    if page.startswith("tutorials/"):
        return tutorial(source(page))
    if page.startswith("api/"):
        module = page.removeprefix("api/").removesuffix(".md")
        heading = "    options: {show_root_heading: true, show_root_toc_entry: true}"
        return "\n\n".join([f"# {module}", f"::: {module}", *(f"::: {name}\n{heading}" for name in hidden(module))])
    return None


def hidden(module: str) -> list[str]:
    """Public names of a module that a reader of source takes for modules of the same name: where they are defined."""
    path, found = file_of(module), []
    if path.name != "__init__.py":
        return []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module is not None:
            origin = f"{module}.{node.module}"
            names = sorted(alias.name for alias in node.names)
            found += [one for one in hidden(origin) if one.rpartition(".")[2] in names]
            found += [f"{origin}.{name}" for name in names if file_of(f"{module}.{name}").exists()]
    return found


def file_of(module: str) -> Path:
    """The source of a module or package; it need not exist."""
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def tutorial(path: Path) -> str:
    """The head of a tutorial as text, the rest as the code that it is."""
    text = path.read_text()
    head = ast.get_docstring(ast.parse(text)) or ""
    title, _, rest = head.partition("\n")
    code = text.split('"""', 2)[2].strip()
    return f"# {title}\n{rest}\n\n```python\n{code}\n```\n"
