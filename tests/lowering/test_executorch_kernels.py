"""Operators for which ExecuTorch's runtime has no kernel are named while lowering."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pt2e_quant.errors import LoweringError
from pt2e_quant.lowering.executorch import kernels, lower_to_executorch, runtime

pytest.importorskip("executorch")


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 4, 1), nn.AdaptiveMaxPool2d(2, return_indices=True)

    def forward(self, x: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        return self.pool(self.conv(x)), torch.cumprod(x, 1)


def test_every_missing_kernel_is_named_with_its_node_module_and_line() -> None:
    exported = torch.export.export(Pooled().eval(), (torch.randn(1, 3, 6, 5),))
    with pytest.raises(LoweringError, match="no kernel for 2 operators that no backend takes") as error:
        lower_to_executorch(exported)
    message = str(error.value)
    assert "- aten::adaptive_max_pool2d.out\n  node adaptive_max_pool2d = " in message
    assert "in module 'pool' (AdaptiveMaxPool2d), test_executorch_kernels.py:" in message
    assert ": return self.pool(self.conv(x)), torch.cumprod(x, 1)\n- aten::cumprod.out" in message
    assert "- aten::cumprod.out\n  node cumprod = " in message
    assert "Write them with other operators" in message


def test_an_operator_that_cannot_write_into_planned_memory_is_named() -> None:
    def forward(x: Tensor) -> Tensor:
        return F.rrelu(x, training=True)

    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return forward(x)

    exported = torch.export.export(Noisy(), (torch.randn(3, 5),))
    with pytest.raises(LoweringError, match=r"no kernel for 1 operator .*\n- aten::rrelu_with_noise"):
        lower_to_executorch(exported)


def test_a_runtime_that_cannot_be_asked_leaves_a_remark(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise ImportError("no runtime in this build")

    monkeypatch.setattr(runtime, "runtime", absent)
    kernels.registered.cache_clear()
    try:
        (remark,) = kernels.unchecked()
        assert "not checked: it cannot be asked (ImportError: no runtime in this build)" in remark.text
    finally:
        kernels.registered.cache_clear()


def test_the_runtime_of_this_process_has_the_kernels_that_quantized_graphs_need() -> None:
    known, unknown = kernels.registered()
    assert unknown == ""
    assert {"aten::add.out", "quantized_decomposed::quantize_per_tensor.out"} <= known
