"""Export on the CPU, move to another device, come back (users' pain 19)."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.errors import ConversionError
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.nets import MLP, export, randomize
from tests.pt2e.kit import STATIC, Toy

XNNPACK = get_symmetric_quantization_config(is_per_channel=True)


def test_a_model_on_the_meta_device_is_prepared_and_its_weights_come_later():
    real, x = randomize(MLP()).eval(), torch.randn(3, 10)
    with torch.device("meta"):
        empty = MLP().eval()
    prepared = prepare_pt2e(torch.export.export(empty, (x.to("meta"),)), XNNPACKQuantizer(XNNPACK))
    assert prepared(x.to("meta")).is_meta
    with pytest.raises(
        ConversionError, match=r"(?s)3 parameters and buffers are on the meta device.*up.weight.*assign"
    ):
        convert_pt2e(prepared)
    prepared.load_state_dict(real.state_dict(), strict=False, assign=True)
    prepared(x)
    expected = prepare_pt2e(export(real, x), XNNPACKQuantizer(XNNPACK))
    expected(x)
    assert torch.equal(convert_pt2e(prepared)(x), convert_pt2e(expected)(x))


class OnADevice(nn.Module):
    """Names a device in three ways: where a tensor is made, moved, and in what export checks of that."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) + torch.arange(4, device=x.device)).to("cpu")


def devices(gm: GraphModule) -> set[str]:
    leaves = [leaf for node in gm.graph.nodes for leaf in pytree.tree_leaves((node.args, node.kwargs))]
    values = [leaf for node in gm.graph.nodes for leaf in pytree.tree_leaves(node.meta.get("val"))]
    found = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    found += [tensor.device for tensor in (*values, *gm.parameters(), *gm.buffers()) if isinstance(tensor, Tensor)]
    return {device.type for device in found}


def test_every_device_that_a_prepared_graph_names_follows_the_module_and_comes_back():
    x = torch.randn(3, 4)
    prepared = prepare_pt2e(export(OnADevice(), x), Toy(STATIC))
    assert devices(prepared) == {"cpu"}
    prepared.to("meta")
    assert devices(prepared) == {"meta"}
    assert prepared(x.to("meta")).is_meta
    with pytest.raises(ConversionError, match="meta device"):
        convert_pt2e(prepared)


def test_asking_for_the_dtype_that_is_there_moves_no_device():
    prepared = prepare_pt2e(export(OnADevice(), torch.randn(3, 4)), Toy(STATIC))
    code = prepared.code
    assert prepared.float().code == code


@pytest.fixture(scope="module")
def trip():
    """What the process found that took a model from the CPU to a second device and back."""
    command = [sys.executable, "-m", "tests.pt2e.second_device"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def test_a_model_exported_on_the_cpu_names_only_the_device_that_it_is_moved_to(trip):
    assert (trip["prepared"], trip["converted"], trip["result on"]) == (["other"], ["other"], "other")


def test_calibration_on_another_device_gives_the_qparams_and_results_of_the_cpu(trip):
    assert trip["other qparams"] == []
    assert trip["same result on the device"]


def test_a_model_that_came_back_converts_on_the_cpu(trip):
    assert trip["back"] == ["cpu"]
    assert trip["same result"]
