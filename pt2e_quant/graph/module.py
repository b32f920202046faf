"""Exported graphs as modules: copy, tidy up, train and eval.

The engine starts with `clone`, a private copy that shares the parameters; passes edit that copy, each ending with
`tidy`; `finish` drops what is no longer used and generates the code.
"""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from ..arguments import bind, dropout_argument, set_argument, training_argument
from ..errors import CaptureError
from ..meta import AROUND_KEY, DROPOUT_P_KEY, FROZEN_NORMS_KEY, PRESERVED_KEY, RECORD_KEY, mark, marks
from ..ops import BATCH_NORM
from .attributes import constant, set_attribute
from .devices import device_of, move_graph, recorded_device
from .nested import bodies, every_node, graphs
from .pickle import dump_graph, load_graph, quiet_copies, restore_attributes, skeleton

__all__ = [
    "ExportedModule",
    "captured_mode",
    "clone",
    "collector_paused",
    "counts_batches",
    "drop_dead",
    "drops",
    "finish",
    "is_guard",
    "mode_switch",
    "set_training",
    "tidy",
    "uncompiled",
]


class ExportedModule(GraphModule):
    """A GraphModule that came from torch.export, on which train() and eval() work.

    Export captures one mode of dropout, batch norm and instance norm as a literal in the graph. Here train(mode)
    rewrites exactly that: p, eps and momentum keep their values, and nothing is recompiled when the mode is already
    the wanted one.
    Attention has no such literal: in evaluation its dropout_p is 0, and a mark keeps the one of training.
    Batch norms with frozen statistics stay in evaluation, those without running statistics in training. Python
    branches on self.training were decided at capture and stay as they are.

    A *draft* is one that passes are at work on: no code is generated before `finish`, or before somebody runs it.
    """

    _draft = False

    def __init__(self, root: nn.Module, graph: Graph, class_name: str = "GraphModule", *, draft: bool = False) -> None:
        object.__setattr__(self, "_draft", draft)  # GraphModule.__init__ compiles, so this comes first
        super().__init__(root, graph, class_name)

    def train(self, mode: bool = True) -> ExportedModule:
        super().train(mode)
        if set_training(self.graph, mode, norms=mode and FROZEN_NORMS_KEY not in self.meta):
            self.recompile()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExportedModule:
        """What to(), cuda() and the like call; the devices that the graph names move along.

        Raises:
            CaptureError: a prepared or converted model would get numbers of another type.
        """
        _expect_same_types(self, fn)
        before = recorded_device(self.graph) or device_of(self)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = device_of(self)
        if after is not None and after != before:
            move_graph(self, after)
        return self

    def recompile(self) -> Any:
        return None if self._draft else super().recompile()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run, inside of what AROUND_KEY in its meta makes."""
        if torch.compiler.is_compiling():
            # Read, so that compiled code holds for these alone: they are literals in the graph, which no guard sees.
            bool(self.training and FROZEN_NORMS_KEY in self.meta)
            return super().__call__(*args, **kwargs)
        around = self.meta.get(AROUND_KEY)
        if around is None:
            return super().__call__(*args, **kwargs)
        with around(self):
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Replaced by generated code once the graph is finished."""
        return finish(self)(*args, **kwargs)

    @property
    def code(self) -> str:
        return self.graph.python_code("self").src if self._draft else super().code

    def __reduce__(self) -> tuple[Any, ...]:
        """As nodes, with what is known of each; code would lose that. See `graph.pickle`."""
        return _restore, (dump_graph(self.graph), skeleton(self), dict(self.meta), self._draft)

    def __deepcopy__(self, memo: dict[int, Any]) -> ExportedModule:
        with quiet_copies():
            return super().__deepcopy__(memo)  # type: ignore[return-value]

    def __str__(self) -> str:
        return f"{nn.Module.__str__(self)}\n\n{self.code}"


def _expect_same_types(gm: GraphModule, fn: Callable[[Tensor], Tensor]) -> None:
    if RECORD_KEY not in gm.meta:
        return
    values = (constant(node) for node in gm.graph.find_nodes(op="get_attr"))
    for dtype in {value.dtype for value in values if value is not None and value.is_floating_point()}:
        wanted = fn(torch.empty(0, dtype=dtype)).dtype
        if wanted is not dtype:
            raise CaptureError(
                f"this graph was exported in {dtype}, which its operators and what is known of its tensors depend on, "
                f"so it cannot become one in {wanted}. Cast the model, and its example inputs, before torch.export; or "
                "train under torch.autocast."
            )


def _restore(data: bytes, root: nn.Module, meta: dict[str, Any], draft: bool) -> ExportedModule:
    module = ExportedModule(root, load_graph(data), draft=draft)
    restore_attributes(module, root)
    module.meta.update(meta)
    for name, value in meta.get(PRESERVED_KEY, {}).items():
        setattr(module, name, value)
    return module


def set_training(graph: Graph, mode: bool, *, norms: bool | None = None) -> int:
    """Set the train/eval literal of every mode-dependent op; the number of nodes that changed.

    Args:
        graph: the graph.
        mode: True for training.
        norms: the mode of batch norms, where it is another one.
    """
    changed = 0
    for node in graph.nodes:
        name = mode_switch(node)
        if name is not None:
            of_norm = counts_batches(node) or node.target in BATCH_NORM
            value = norms if of_norm and norms is not None else mode
            changed += set_argument(node, name, int(value) if counts_batches(node) else value)
        changed += _set_dropout(node, mode)
    return changed


def _set_dropout(node: Node, mode: bool) -> bool:
    """Let a dropout without a switch drop in training, and nothing in evaluation; True when that changed it."""
    name = dropout_argument(node.target)
    given = bind(node)[name] if name else 0.0
    if name is None or (mode and given):
        return False
    if given:
        mark(node, DROPOUT_P_KEY, given)
    return set_argument(node, name, marks(node).get(DROPOUT_P_KEY, 0.0) if mode else 0.0)


def counts_batches(node: Node) -> bool:
    """Whether a node adds 1 to a counter that nothing in the graph reads, as a batch norm does in training."""
    if node.target is not torch.ops.aten.add_.Tensor or node.users or node.args[1] not in (0, 1):
        return False
    counter = constant(node.args[0])
    return counter is not None and counter.dtype is torch.int64 and counter.dim() == 0


def mode_switch(node: Node) -> str | None:
    """Name of the argument by which a node follows the mode; None for what does not."""
    if counts_batches(node):
        return "other"
    is_instance_norm = node.target is torch.ops.aten.instance_norm.default
    name = "use_input_stats" if is_instance_norm else training_argument(node.target)
    if name is None or not (is_instance_norm or node.target in BATCH_NORM):
        return name
    return None if bind(node).get("running_var", node) is None else name  # it has no other statistics


def clone(gm: GraphModule) -> ExportedModule:
    """A draft with graphs and a module tree of its own that shares parameters, buffers and observers with `gm`."""
    with quiet_copies():
        # deepcopy keeps the calling convention of exported modules (pytree in and out), Graph.graph_copy loses it.
        graph = copy.deepcopy(gm.graph)
    module = ExportedModule(gm, graph, draft=True)  # copies only those attributes that the graph names
    _keep_persistence(gm, module)
    module.meta.update(gm.meta)
    for target, body in bodies(gm):
        set_attribute(module, target, clone(body))
    return module


def uncompiled(model: Any) -> Any:
    """The module that torch.compile made one of; any other as it is."""
    return getattr(model, "_orig_mod", model)


def tidy(gm: GraphModule) -> GraphModule:
    """Drop dead nodes and lint. Ends a pass that changed the graph."""
    drop_dead(gm).graph.lint()
    return gm


def drop_dead(gm: GraphModule) -> GraphModule:
    """Drop the nodes that nobody reads."""
    for node in reversed(gm.graph.nodes):
        # What Graph.eliminate_dead_code does, which asks every node whether it is impure before whether it is used.
        if not node.users and not node.is_impure():
            gm.graph.erase_node(node)
    return gm


def finish(gm: ExportedModule) -> ExportedModule:
    """End of drafting: drop the attributes that the graphs do not name, and generate the code."""
    for _, part in reversed(list(graphs(gm))):
        part.graph.lint()
        _drop_unused(part)
        object.__setattr__(part, "_draft", False)
        part.recompile()
    nn.Module.train(gm, captured_mode(gm))
    return gm


def _drop_unused(gm: GraphModule) -> None:
    used = {str(node.target) for node in gm.graph.nodes if node.op in ("get_attr", "call_module")}
    needed = used.union(*map(_prefixes, used))
    modules = [path for path, _ in gm.named_modules() if path not in needed and used.isdisjoint(_prefixes(path))]
    for path in filter(None, modules):  # first: they may belong to others as well, so their own attributes must stay
        gm.delete_submodule(path)
    for path, module in list(gm.named_modules()):
        if path in used or not used.isdisjoint(_prefixes(path)):
            continue  # an observer or a nested graph keeps all that is its own
        for name in (*module._parameters, *module._buffers):
            if (f"{path}.{name}" if path else name) not in used:
                delattr(module, name)


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def captured_mode(gm: GraphModule) -> bool:
    """The mode that the first mode-dependent op of the graphs was captured in; False when there is none."""
    for node in every_node(gm):
        name = mode_switch(node)
        if name is not None:
            return bool(bind(node)[name])
        if drops(node):
            return True
    return False


def drops(node: Node) -> bool:
    """Whether a node draws what it drops, as attention does in training, and has no switch for that."""
    name = dropout_argument(node.target)
    return name is not None and bool(bind(node)[name])


def _keep_persistence(root: nn.Module, module: nn.Module) -> None:
    """GraphModule registers every buffer as persistent; restore what the original says, so state_dict keys agree."""
    originals = dict(root.named_modules())
    for path, child in module.named_modules():
        if path in originals:
            transient = originals[path]._non_persistent_buffers_set & set(child._buffers)
            child._non_persistent_buffers_set |= transient


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Pause Python's cyclic garbage collector while a graph is built; also a decorator.

    Each of its full runs visits every live node, which makes building a graph of n nodes quadratic in n, and finds
    nothing: the nodes are all in use.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def is_guard(node: Node) -> bool:
    """True for the call that torch.export adds to check input shapes; it computes nothing that the model uses."""
    return node.op == "call_module" and str(node.target) == "_guards_fn"
