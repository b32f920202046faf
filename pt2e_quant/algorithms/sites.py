"""Sites: the weighted ops of a prepared graph that an algorithm can work on, and the reasons of the others."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..arguments import set_argument
from ..errors import CaptureError
from ..graph.attributes import attribute, free_name, insert_attribute, set_attribute
from ..graph.constants import Constants
from ..graph.module import ExportedModule, clone
from ..graph.run import writes_to_buffer
from ..meta import WEIGHT_OBSERVERS_KEY
from ..observer.derived import DerivedObserver
from ..observer.settled import SettledObserver
from ..ops import LINEAR, PRODUCTS, factors, is_conv_transpose
from ..pt2e.authors import code_of
from ..pt2e.observed import ObserverReading, QParams, read_observer, read_qparams
from ..pt2e.record import PointRecord, record_of

__all__ = [
    "Site", "choose_weight", "give_bias", "grid_of", "set_parameter", "settle", "sites_of", "static_grid", "uses_of",
    "working_copy",
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Site:
    """A linear or convolution whose weight is rounded on a static grid.

    node:     the op
    weight:   the node that reads its parameter; nobody else reads that
    observer: name of the weight's observer
    """

    node: Node
    weight: Node
    observer: str

    @property
    def channels(self) -> int:
        """The dimension of the op's result that has its output channels, counted from the end."""
        return -1 if self.node.target in LINEAR else 1 - len(self.weight.meta["val"].shape)

    @property
    def rows(self) -> int:
        """The dimension of the weight that has its output channels; of a transposed one, those of one group."""
        return 1 if is_conv_transpose(self.node) else 0


def working_copy(prepared: GraphModule, asked_by: str) -> ExportedModule:
    """A copy of a prepared, calibrated graph to work on; parameters and observers are shared until they are set.

    Raises:
        CaptureError: it is no graph that `prepare_pt2e` returned, or one whose runs depend on each other, or one with
            observers in nested graphs.
    """
    record = record_of(prepared)
    if record is None or record.stage != "prepared" or record.trained:
        raise CaptureError(
            f"{asked_by} takes what prepare_pt2e returned, after calibration data ran through it, before convert_pt2e"
        )
    gm = clone(prepared)
    written = [node.name for node in gm.graph.nodes if writes_to_buffer(node)]
    if written:
        raise CaptureError(
            f"{asked_by}: the model writes to its buffers ({', '.join(written[:3])}), so what a batch gives depends on "
            "those before it. Export it without the cache."
        )
    nested = [point.location for point in record.points if "." in point.producer]
    if nested:
        raise CaptureError(
            f"{asked_by}: tensors inside of nested graphs (torch.cond, while_loop, ...) are quantized, and what runs "
            f"there cannot be looked at:\n{nested[0]}\n"
            "  Keep those modules in float, or convert without this algorithm."
        )
    gm.meta[WEIGHT_OBSERVERS_KEY] = dict(gm.meta.get(WEIGHT_OBSERVERS_KEY, {}))
    return gm


def sites_of(gm: GraphModule) -> tuple[list[Site], dict[str, str]]:
    """The sites of a prepared graph, in its order; and by the name of each other weighted op, why it is none."""
    constants = Constants(gm)
    points = {point.producer: point for point in _points(gm) if point.constant}
    readers = Counter(str(node.target) for node in gm.graph.find_nodes(op="get_attr") for _ in (node.users or ()))
    found: list[Site] = []
    reasons: dict[str, str] = {}
    for node in gm.graph.nodes:
        if node.target not in PRODUCTS:
            continue
        weight = factors(node)[1]
        reason = _why_not(gm, weight, constants, readers, points)
        if reason is None:
            found.append(Site(node, weight, points[weight.name].observer))
        else:
            reasons[node.name] = reason
    return found, reasons


def _points(gm: GraphModule) -> list[PointRecord]:
    record = record_of(gm)
    return [] if record is None else record.points_by_graph()[""]


def _why_not(
    gm: GraphModule, weight: Any, constants: Constants, readers: Counter[str], points: dict[str, PointRecord]
) -> str | None:
    if weight not in constants:
        return "its weight is computed from inputs of the model"
    if weight.op != "get_attr":
        return f"its weight is computed by {weight.name}"
    if readers[str(weight.target)] > 1:
        return "other operators read its weight too"
    if weight.name not in points:
        return "its weight stays in float"
    observer = points[weight.name].observer
    if sum(point.observer == observer for point in _points(gm)) > 1:
        return "its weight shares a grid with another tensor"
    reading = read_observer(attribute(gm, observer))
    if reading.writes_pairs:
        return f"{type(reading.observer).__name__} writes the grid of its weight itself"
    return None if reading.is_integer and not reading.is_dynamic else "its weight has no grid of integers"


def grid_of(gm: GraphModule, name: str, value: Tensor | None = None) -> QParams | None:
    """The grid that an observer gives; with `value`, a copy of it that saw this too. None where it has seen nothing."""
    return _grid(attribute(gm, name), value)


def _grid(observer: nn.Module, value: Tensor | None) -> QParams | None:
    observer = observer if value is None else _seen(observer, value)
    reading: ObserverReading = read_observer(observer)
    return read_qparams(reading) if reading.has_data and not reading.writes_pairs else None


def _seen(observer: nn.Module, value: Tensor) -> nn.Module:
    """A copy that saw this."""
    observer = copy.deepcopy(observer)
    with code_of(f"{type(observer).__name__} on a weight, {list(value.shape)},", CaptureError):
        observer.to(value.device)(value)
    return observer


def static_grid(gm: GraphModule, site: Site, weight: Tensor) -> QParams:
    """The grid that a site's observer gives its weight."""
    qparams = grid_of(gm, site.observer, weight)
    if qparams is None:
        raise CaptureError(f"the weight of {site.node.name} has no grid")
    return qparams


def choose_weight(gm: GraphModule, site: Site, scale: Tensor, zero_point: Tensor, weight: Tensor) -> None:
    """Let convert give a site this weight, which lies on this grid."""
    settle(gm, site.observer, scale, zero_point, like=weight)
    set_parameter(gm, site.weight, weight)


def set_parameter(gm: GraphModule, node: Node, value: Tensor) -> None:
    """Give the parameter that a node reads another value; those who share it with this graph keep theirs."""
    held = attribute(gm, str(node.target))
    new = value.detach().to(held.dtype)
    set_attribute(gm, str(node.target), nn.Parameter(new, requires_grad=False))


def give_bias(gm: GraphModule, sites: list[Site]) -> dict[str, Node]:
    """The node of each site's bias, of its own, by the name of the op; one of zeros is made where there is none."""
    names = free_name(gm, "_bias_")
    found: dict[str, Node] = {}
    for site in sites:
        bias = factors(site.node)[2]
        own = isinstance(bias, Node) and bias.op == "get_attr"
        shared = own and uses_of(gm, str(bias.target)) > 1
        if bias is None or shared:
            old = attribute(gm, str(bias.target)).detach().clone() if shared else _zeros(gm, site)
            with gm.graph.inserting_before(site.node):
                value = nn.Parameter(old, requires_grad=False)
                bias = insert_attribute(gm, next(names), value, like=site.weight, by="give_bias")
            set_argument(site.node, "bias", bias)
        elif not own:
            continue
        found[site.node.name] = bias
    return found


def uses_of(gm: GraphModule, target: str) -> int:
    """How many operators read a parameter."""
    return sum(len(node.users) for node in gm.graph.find_nodes(op="get_attr") if str(node.target) == target)


def _zeros(gm: GraphModule, site: Site) -> Tensor:
    weight: Tensor = attribute(gm, str(site.weight.target))
    return weight.new_zeros(int(site.node.meta["val"].shape[site.channels])).detach()


def settle(gm: GraphModule, name: str, scale: Tensor, zero_point: Tensor, like: Tensor | None = None) -> None:
    """Let an observer give this grid, and all that derive from it see that.

    `like` is for one that has seen nothing yet: some learn from a tensor what their groups are.
    """
    old: nn.Module = attribute(gm, name)
    _exchange(gm, name, SettledObserver(old if like is None else _seen(old, like), scale, zero_point))
    new = attribute(gm, name)
    for other, observer in list(gm.named_children()):
        if isinstance(observer, DerivedObserver) and any(source is old for source in observer.sources):
            derived = copy.copy(observer)
            derived.sources = [new if source is old else source for source in observer.sources]
            _exchange(gm, other, derived)


def _exchange(gm: GraphModule, name: str, observer: nn.Module) -> None:
    set_attribute(gm, name, observer)
    if name in gm.meta[WEIGHT_OBSERVERS_KEY]:
        gm.meta[WEIGHT_OBSERVERS_KEY][name] = observer
