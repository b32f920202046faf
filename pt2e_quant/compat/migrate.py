"""Rewrite the source of a program for torch.ao.quantization to import from this package. Needs the extra `migrate`.

Before this: `aliases` says which module stands for which. After it: `pt2e-quant migrate` shows and writes files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import libcst as cst
from libcst.codemod import CodemodContext
from libcst.codemod.visitors import AddImportsVisitor
from libcst.helpers import get_full_name_for_node
from libcst.metadata import MetadataWrapper, ParentNodeProvider, PositionProvider, QualifiedNameProvider

from ..checks import checked
from ..errors import LegacyImportError
from .aliases import ALIASES, FUNCTIONS, home_of, is_legacy, missing

__all__ = ["Left", "Migrated", "migrate_source"]


@dataclass(frozen=True)
class Left:
    """What stays as it was.

    line: of the file, from 1.
    why:  in words.
    """

    line: int
    why: str


@dataclass(frozen=True)
class Migrated:
    """The new source, and what a person has to look at."""

    source: str
    left: tuple[Left, ...]


@checked(LegacyImportError)
def migrate_source(source: str) -> Migrated:
    """Imports of the old roots, and attributes of torch that are below them, become those of this package.

    Comments and layout stay. Names that this package lacks, modules that only torch has, and texts that name an old
    module stay, too, and are listed; so is a source that is not Python.
    """
    try:
        wrapper = MetadataWrapper(cst.parse_module(source))
    except cst.ParserSyntaxError as error:
        return Migrated(source, (Left(error.raw_line, f"not Python: {error.message}"),))
    rewriter = _Rewriter()
    tree = wrapper.visit(rewriter)
    context = CodemodContext()
    for module in sorted(rewriter.needed):
        AddImportsVisitor.add_needed_import(context, module)
    added = AddImportsVisitor(context).transform_module(tree)
    return Migrated(added.code, tuple(sorted(rewriter.left, key=lambda one: one.line)))


class _Rewriter(cst.CSTTransformer):
    """One pass.

    needed:        modules that rewritten attributes need an import of.
    left:          what stays.
    imports_torch: whether `import torch` was met.
    """

    METADATA_DEPENDENCIES = (ParentNodeProvider, PositionProvider, QualifiedNameProvider)

    def __init__(self) -> None:
        super().__init__()
        self.needed: set[str] = set()
        self.left: list[Left] = []
        self.imports_torch = False

    # --- attributes ---------------------------------------------------------------------------------------------------

    def visit_Attribute(self, node: cst.Attribute) -> bool:
        if self._in_import(node):
            return False
        name = self._qualified(node)
        module, _, last = name.rpartition(".")
        if ALIASES.get(module) and name not in ALIASES and home_of(module, last) is None:
            self._leave(node, str(missing(name)))
            return False
        return self._new(name) is None

    def leave_Attribute(self, original_node: cst.Attribute, updated_node: cst.Attribute) -> cst.BaseExpression:
        new = None if self._in_import(original_node) else self._new(self._qualified(original_node))
        if new is None:
            return updated_node
        self.needed.add(new.removesuffix(f".{original_node.attr.value}") if new in _NEW_FUNCTIONS else new)
        return cst.parse_expression(new)

    def _new(self, name: str) -> str | None:
        """What stands for a whole module, or for a function of torch; names of a module keep the last part."""
        module, _, last = name.rpartition(".")
        if module == "torch" and last in FUNCTIONS:
            return f"pt2e_quant.{last}"
        hidden = ALIASES.get(module) is not None and home_of(module, last) is not None  # fuse_modules: a function, too
        return None if hidden else ALIASES.get(name)

    # --- imports ------------------------------------------------------------------------------------------------------

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> Any:
        statements: list[cst.BaseSmallStatement] = []
        for statement in updated_node.body:
            statements += self._rewritten(original_node, statement)
        if statements == list(updated_node.body):
            self.imports_torch |= _code(updated_node).startswith("import torch\n")
            return updated_node
        plain = [one.with_changes(semicolon=cst.MaybeSentinel.DEFAULT) for one in statements]
        lines = [cst.SimpleStatementLine([one]) for one in plain]
        lines[0] = lines[0].with_changes(leading_lines=[*updated_node.leading_lines, *_lost(updated_node, plain)])
        lines[-1] = lines[-1].with_changes(trailing_whitespace=updated_node.trailing_whitespace)
        at_top = isinstance(self.get_metadata(ParentNodeProvider, original_node), cst.Module)
        if at_top and self.imports_torch and list(map(_code, plain)) == ["import torch"]:
            return cst.RemoveFromParent()
        return cst.FlattenSentinel(lines)

    def _rewritten(self, line: cst.CSTNode, statement: Any) -> list[cst.BaseSmallStatement]:
        if isinstance(statement, cst.ImportFrom) and statement.module is not None and not statement.relative:
            return list(self._from(line, statement, get_full_name_for_node(statement.module) or ""))
        if isinstance(statement, cst.Import):
            parts = [self._import(line, alias) for alias in statement.names]
            return [statement] if all(part is None for part in parts) else _joined(statement, parts)
        return [statement]

    def _import(self, line: cst.CSTNode, alias: cst.ImportAlias) -> cst.ImportAlias | None:
        name = get_full_name_for_node(alias.name) or ""
        if ALIASES.get(name) is None:
            if is_legacy(name) and name not in ALIASES:
                self._leave(line, str(missing(name)))
            return None
        if alias.asname is None:  # its attributes are rewritten, and import what they need
            return cst.ImportAlias(cst.Name("torch"))
        return alias.with_changes(name=_dotted(ALIASES[name]))

    def _from(self, line: cst.CSTNode, node: cst.ImportFrom, module: str) -> Iterator[cst.BaseSmallStatement]:
        if isinstance(node.names, cst.ImportStar):
            yield node.with_changes(module=_dotted(ALIASES[module])) if ALIASES.get(module) else node
            return
        homes: dict[str, list[cst.ImportAlias]] = {}
        for alias in node.names:
            home, taken = self._home(line, module, alias)
            homes.setdefault(home, []).append(taken)
        if len(homes) == 1 and all(map(cst.ImportAlias.deep_equals, next(iter(homes.values())), node.names)):
            yield node if module in homes else node.with_changes(module=_dotted(next(iter(homes))))
            return
        for home, names in homes.items():
            listed = [one.with_changes(comma=cst.MaybeSentinel.DEFAULT) for one in names]
            yield cst.ImportFrom(module=_dotted(home), names=listed, lpar=None, rpar=None)

    def _home(self, line: cst.CSTNode, module: str, alias: cst.ImportAlias) -> tuple[str, cst.ImportAlias]:
        """The module to import a name from, and the name there under the one that the program uses."""
        name = get_full_name_for_node(alias.name) or ""
        full = f"{module}.{name}"
        home = home_of(module, name) if module == "torch" or ALIASES.get(module) else None
        if home is not None:
            return home, alias
        new = ALIASES.get(full)
        if new is not None:
            parent, _, last = new.rpartition(".")
            kept = alias.asname or (None if last == name else cst.AsName(cst.Name(name)))
            return parent, alias.with_changes(name=cst.Name(last), asname=kept)
        if is_legacy(full) and full not in ALIASES:
            self._leave(line, str(missing(full)))
        return module, alias

    # --- the rest -----------------------------------------------------------------------------------------------------

    def visit_SimpleString(self, node: cst.SimpleString) -> None:
        text = node.evaluated_value
        if isinstance(text, str) and re.fullmatch(r"[\w.]+(:\w+)?", text) and is_legacy(text.partition(":")[0]):
            self._leave(node, f"the text {text!r} names an old module")

    def _leave(self, node: cst.CSTNode, why: str) -> None:
        self.left.append(Left(self.get_metadata(PositionProvider, node).start.line, why))

    def _qualified(self, node: cst.CSTNode) -> str:
        return next((one.name for one in self.get_metadata(QualifiedNameProvider, node, set())), "")

    def _in_import(self, node: cst.CSTNode) -> bool:
        parent = self.get_metadata(ParentNodeProvider, node)
        while isinstance(parent, cst.Attribute):
            parent = self.get_metadata(ParentNodeProvider, parent)
        return isinstance(parent, cst.ImportAlias | cst.ImportFrom)


_NEW_FUNCTIONS = tuple(f"pt2e_quant.{name}" for name in FUNCTIONS)


def _dotted(name: str | None) -> Any:
    return cst.parse_expression(name or "")


def _joined(statement: cst.Import, parts: list[cst.ImportAlias | None]) -> list[cst.BaseSmallStatement]:
    """One import with what changed and what stays; `import torch` once."""
    names = {}
    for old, new in zip(statement.names, parts, strict=True):
        taken = (new or old).with_changes(comma=cst.MaybeSentinel.DEFAULT)
        names[_code(taken)] = taken
    return [statement.with_changes(names=list(names.values()))]


def _lost(line: cst.SimpleStatementLine, statements: list[Any]) -> list[cst.EmptyLine]:
    """Comments between the names of an import that becomes several; they go before the first."""
    inside, kept = "".join(map(_code, line.body)), "".join(map(_code, statements))
    comments = [one.rstrip() for one in re.findall("#.*", inside)] if "import" in inside else []
    return [cst.EmptyLine(comment=cst.Comment(one)) for one in comments if one not in kept]


def _code(node: cst.CSTNode) -> str:
    return cst.Module([]).code_for_node(node)
