"""Where in a model something is: the node, its module, the line of the user's source.

`locate` writes the "where" part of every message, so that all messages look alike.
"""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Iterable
from textwrap import indent

from torch.fx import GraphModule, Node
from torch.fx.traceback import NodeSource, NodeSourceAction

from .meta import NESTED_KEY

__all__ = [
    "computed_name",
    "copy_origin",
    "describe_site",
    "exported_name",
    "in_graph",
    "locate",
    "locate_all",
    "module_path",
    "module_stack",
    "module_type",
    "node_id",
    "source_line",
    "target_name",
    "type_name",
]


def node_id(node: Node) -> str:
    """The name of a node, after the path of its graph when that is nested: 'conv2d', 'true_graph_0.conv2d'."""
    return in_graph(node.graph.owning_module, node.name)


def describe_site(site: object) -> str:
    """'conv2d' for a node's output, 'x -> conv2d' for one use of x."""
    if isinstance(site, tuple):
        return " -> ".join(node_id(node) if place == 0 else node.name for place, node in enumerate(site))
    return node_id(site) if isinstance(site, Node) else repr(site)


def in_graph(gm: GraphModule | None, name: str) -> str:
    """What a name inside a graph is called seen from the outermost graph."""
    path = "" if gm is None else gm.meta.get(NESTED_KEY)
    return f"{path}.{name}" if path else name


def locate(node: Node) -> str:
    """One or two lines that name a node, the module it comes from and the line of the user's source.

    >>> print(locate(node))                                                       # doctest: +SKIP
    node add_3 = aten.add.Tensor(positions, conv2d_2)
      in module 'encoder.block.1' (Block), model.py:41: x = positions + x
    """
    arguments = ", ".join(_short(argument) for argument in (*node.args, *node.kwargs.values()))
    first = (
        f"node {node_id(node)} = {target_name(node)}({arguments})"
        if node.op != "placeholder"
        else f"input {node_id(node)}"
    )
    path, kind, line = module_path(node), module_type(node).rpartition(".")[2], source_line(node)
    places = []
    if kind == "?":  # of a nested graph, which records no modules, the path may be known from a parameter
        places += [f"in module {path!r}"] if path else []
    elif path is not None:
        places.append(f"in module {path!r} ({kind})" if path else f"in {kind}")
    if line is not None:
        places.append(line)
    return f"{first}\n  {', '.join(places)}" if places else first


def locate_all(nodes: Iterable[Node], limit: int = 8) -> str:
    """`locate` for several nodes, indented, with a count of those left out after `limit`."""
    found = list(nodes)
    more = [f"... and {len(found) - limit} more"] if len(found) > limit else []
    return indent("\n".join([*map(locate, found[:limit]), *more]), "  ")


def module_stack(node: Node) -> list[tuple[str, object]]:
    """(dotted path, class or class name) of the nn.Modules that the node was captured in, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return [(_clean_path(path), kind) for path, kind in stack.values()]


def module_path(node: Node) -> str | None:
    """Dotted path of the innermost nn.Module that the node was captured in ('' is the root); None when not recorded."""
    stack = node.meta.get("nn_module_stack")
    return _clean_path(next(reversed(stack.values()))[0]) if stack else None


def module_type(node: Node) -> str:
    """Qualified class name of the innermost nn.Module that the node was captured in; '?' when not recorded."""
    stack = module_stack(node)
    return type_name(stack[-1][1]) if stack else "?"


def type_name(kind: object) -> str:
    """'package.module.Class' for a class; export records classes as strings in some modes, which pass through."""
    return f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else str(kind)


def source_line(node: Node) -> str | None:
    """'file.py:12: code' of the user's innermost frame outside torch; None when the graph carries no stack trace."""
    trace = node.meta.get("stack_trace")
    return _user_frame(trace) if trace else None


_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)')


_TORCH_FILE = re.compile(r"[/\\]torch[/\\]((nn|_dynamo|export|fx|_export)[/\\]|overrides\.py|_tensor\.py)")


@functools.lru_cache(maxsize=4096)
def _user_frame(trace: str) -> str | None:
    frames = [frame for frame in _FRAME.findall(trace) if not frame[0].startswith("<")]  # no generated code
    if not frames:
        return None
    file, line, code = next((frame for frame in reversed(frames) if not _TORCH_FILE.search(frame[0])), frames[-1])
    name = file.replace("\\", "/").rpartition("/")[2]
    return f"{name}:{line}: {code.strip()}"


@functools.lru_cache(maxsize=4096)
def _clean_path(path: str) -> str:
    """'conv' from "L['self'].conv" (strict export), '_export_root.conv' (in a nested graph), 'conv' (non-strict)."""
    path = re.sub(r"^L\['self'\]\.?|^L__self___?|^_export_root\.?", "", path)
    return re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", path).replace("_modules.", "").lstrip(".")


def target_name(node: Node) -> str:
    """What a node calls: an operator in full, a function of Python by its name, else 'call_module[conv1]'."""
    if node.op != "call_function":
        return f"{node.op}[{node.target}]"
    return node.target.__name__ if isinstance(node.target, _FUNCTIONS) else str(node.target)


def _short(argument: object) -> str:
    text = str(argument)
    return text if len(text) <= 40 else f"{text[:37]}..."


def copy_origin(node: Node, source: Node, by: str) -> Node:
    """Give a new node the stack trace and module of the node it stems from, and say which pass made it."""
    for key in ("stack_trace", "nn_module_stack", "custom"):
        if key in source.meta:
            node.meta.setdefault(key, source.meta[key])
    origin = NodeSource(None, by, NodeSourceAction.CREATE)
    # NodeSource(source) would deep-copy the whole provenance of `source`; nobody writes to it, so it can be shared.
    origin.node_info = NodeSource.NodeInfo(source.name, str(source.target), id(source.graph))
    origin.from_node = source.meta.get("from_node", [])
    node.meta["from_node"] = [origin]
    return node


def exported_name(node: Node) -> str:
    """Name of the node of the exported program that this one is, or stems from; its own where that is not recorded."""
    name, sources = node.name, node.meta.get("from_node")
    while sources:
        name, made_by, sources = sources[0].name, sources[0].pass_name, sources[0].from_node
        if made_by == "ExportedProgram.module()":
            break
    return name


def computed_name(node: Node) -> str:
    """Name, in the program that was exported first, of the node whose value this one has.

    Like `exported_name`, but through every export, decomposition and file since then. Where an op was folded into
    this one, it is the name of that op: a convolution that took a batch norm in computes what the batch norm did.
    """
    name, sources = node.name, node.meta.get("from_node")
    while sources:
        name, sources = sources[-1].name, sources[-1].from_node
    return name
