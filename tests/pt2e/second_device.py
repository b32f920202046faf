"""A second device for machines that have none: 'other', whose tensors are CPU tensors that no CPU op may touch.

Registers for the whole process, so tests run it in a process of its own: `python -m tests.pt2e.second_device` exports a
model on the CPU, calibrates and converts it on the device and back, and prints what it found as JSON.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

DEVICE = "other"
_near: dict[int, Tensor] = {}  # the CPU tensor behind each storage of the device
_libraries = [torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")]


class Far(Tensor):
    """A tensor on the device."""

    @staticmethod
    def __new__(cls, near: Tensor) -> Far:
        far = torch._C._acc.create_empty_tensor(near.shape, near.dtype)
        far.__class__ = cls
        return far

    def __init__(self, near: Tensor) -> None:
        _near[self.untyped_storage()._cdata] = near

    def __deepcopy__(self, memo: dict[int, Any]) -> Far:
        return memo.setdefault(id(self), Far(near(self).clone()))


def near(x: Any) -> Any:
    return _near[x.untyped_storage()._cdata] if isinstance(x, Tensor) and x.device.type == DEVICE else x


def far(x: Any) -> Any:
    return Far(x.detach()) if isinstance(x, Tensor) else x


def register() -> None:
    _setup_privateuseone_for_python_backend(DEVICE)
    anything, aten = _libraries
    anything.fallback(_kernel, "PrivateUse1")
    aten.impl("_to_copy", _to_copy, "PrivateUse1")
    aten.impl("_copy_from", _copy_from, "PrivateUse1")
    aten.impl("_local_scalar_dense", lambda x: near(x).item(), "PrivateUse1")
    aten.impl("empty.memory_format", lambda size, dtype=None, **_: Far(torch.empty(size, dtype=dtype)), "PrivateUse1")
    aten.impl("resize_", _resize, "PrivateUse1")
    aten.impl("arange", lambda end, dtype=None, **_: Far(torch.arange(end, dtype=dtype)), "PrivateUse1")
    ops = torch.ops.aten
    for op in (ops.abs.default, ops.bitwise_and_.Scalar, ops.view.dtype):  # these have kernels for every device
        aten.impl(op, functools.partial(_kernel, op), "PrivateUse1")
    aten.impl(
        "empty_strided", lambda size, stride, dtype=None, **_: Far(torch.empty_strided(size, stride, dtype=dtype)),
        "PrivateUse1",
    )  # fmt: skip


def _kernel(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Every op: on the CPU tensors behind its arguments, all of which must be on the device, or 0-d."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    strangers = [x for x in tensors if x.device.type != DEVICE and x.dim()]
    if strangers:
        raise RuntimeError(f"{op} got tensors on {DEVICE} and on {strangers[0].device}")
    if "device" in kwargs:
        kwargs["device"] = "cpu"
    args_near, kwargs_near = tree_map(near, (args, kwargs))
    said = op._schema.arguments  # numbers that torch made a tensor of arrive here as numbers
    wrapped = [str(a.type) == "Tensor" and isinstance(v, (int, float)) for v, a in zip(args, said, strict=False)]
    args_near = [torch.tensor(v) if w else v for v, w in zip(args_near, wrapped, strict=True)]
    result = op(*args_near, **kwargs_near)
    written = [kwargs.get(a.name, args[i] if i < len(args) else None) for i, a in enumerate(said) if a.is_write]
    if written:
        resized = [x for x in written if x.shape != near(x).shape]
        if resized:
            raise NotImplementedError(f"{op} resizes its output; give its functional form a kernel of its own")
        return written[0] if len(op._schema.returns) == 1 else tuple(written)
    return tuple(map(far, result)) if isinstance(result, (tuple, list)) else far(result)


def _to_copy(x: Tensor, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Tensor:
    copied = near(x).to(dtype or x.dtype, copy=True)
    return Far(copied) if torch.device(device or x.device).type == DEVICE else copied


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    near(target).copy_(near(source))
    return target


def _resize(x: Tensor, size: list[int], memory_format: Any = None) -> Tensor:
    x.data = Far(near(x).clone().resize_(size))
    return x


class Net(nn.Module):
    """A buffer that is written to, a tensor made on a device, a move to a device, a scale for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5, bias=False)
        self.register_buffer("seen", torch.zeros(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x)) + torch.arange(8, device=x.device).to(torch.float32)
        self.seen.copy_(y)
        return self.second(y.to("cpu")) * 0.5


def _devices(gm: torch.fx.GraphModule) -> list[str]:
    """Every device that the module, its graph or its recorded values name."""
    found = [tensor.device for tensor in (*gm.parameters(), *gm.buffers())]
    for node in gm.graph.nodes:
        leaves = tree_leaves((node.args, node.kwargs, node.meta.get("val")))
        found += [leaf for leaf in leaves if isinstance(leaf, torch.device)]
        found += [leaf.device for leaf in leaves if isinstance(leaf, Tensor)]
    return sorted({device.type for device in found})


def main() -> dict[str, Any]:
    from pt2e_quant import convert_pt2e, explain, prepare_pt2e
    from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config

    torch.manual_seed(0)
    x = [torch.randn(3, 6) for _ in range(4)]
    exported = torch.export.export(Net().eval(), (x[0],))
    quantizer = XNNPACKQuantizer(get_symmetric_quantization_config(is_per_channel=True))
    here, there = prepare_pt2e(exported, quantizer), prepare_pt2e(exported, quantizer)
    register()
    with torch.no_grad():
        there.to(DEVICE)
        moved = _devices(there)
        for batch in x[:3]:
            here(batch)
            there(batch.to(DEVICE))
        converted = convert_pt2e(there)
        result = converted(x[3].to(DEVICE))
        on_device = _devices(converted)
        there.to("cpu")
        back, expected = convert_pt2e(there), convert_pt2e(here)
        difference = [
            (one.observer, one.scale, other.scale)
            for one, other in zip(explain(back).groups, explain(expected).groups, strict=True)
            if (one.scale, one.zero_point) != (other.scale, other.zero_point)
        ]
        return {
            "prepared": moved,
            "converted": on_device,
            "back": _devices(back),
            "result on": result.device.type,
            "other qparams": difference,
            "same result on the device": bool(torch.equal(near(result), expected(x[3]))),
            "same result": bool(torch.equal(back(x[3]), expected(x[3]))),
        }


if __name__ == "__main__":
    print(json.dumps(main()))
