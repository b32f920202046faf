"""Checkpoints of prepared models and files of converted ones, across processes (users' pains 12 and 30)."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
import torch

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.nets import ConvNet, export

PREPARE = """
    import json, sys, torch
    from pt2e_quant import convert_pt2e, prepare_pt2e
    from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
    from tests.nets import ConvNet, export
    config = get_symmetric_quantization_config(is_per_channel=True)
    prepared = prepare_pt2e(export(ConvNet(), torch.randn(2, 3, 16, 16)), XNNPACKQuantizer(config))
    print(json.dumps({name: list(value.shape) for name, value in prepared.state_dict().items()}))
    state, x, expected = torch.load(sys.argv[1])
    prepared.load_state_dict(state, strict=True)
    same = [torch.equal(value, state[name]) for name, value in prepared.state_dict().items()]
    print(all(same), torch.equal(convert_pt2e(prepared)(x), expected))
"""

LOAD = """
    import sys, torch
    import pt2e_quant
    loaded = torch.export.load(sys.argv[1]).module()
    inputs, expected = torch.load(sys.argv[2])
    print(torch.equal(loaded(*inputs), expected), sum(p.dtype is torch.int8 for p in loaded.state_dict().values()))
"""


@pytest.fixture
def prepared():
    config = get_symmetric_quantization_config(is_per_channel=True)
    return prepare_pt2e(export(ConvNet(), torch.randn(2, 3, 16, 16)), XNNPACKQuantizer(config))


def run(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_another_process_prepares_the_same_state_and_loads_a_checkpoint_strictly_bit_for_bit(prepared, tmp_path):
    """Users' item 12: two processes give identical state_dict keys and shapes, and a strict load in a new process is
    bit-exact with the state of the observers: it converts to the same model."""
    here = {name: list(value.shape) for name, value in prepared.state_dict().items()}
    x = torch.randn(2, 3, 16, 16)
    prepared(x)
    prepared(2 * x)
    torch.save((prepared.state_dict(), x, convert_pt2e(prepared)(x).detach()), tmp_path / "checkpoint.pt")
    shapes, equal = run(PREPARE, tmp_path / "checkpoint.pt").splitlines()
    assert json.loads(shapes) == here
    assert equal.split() == ["True", "True"]


def test_a_calibrated_state_loads_strictly_into_a_fresh_prepared_model_bit_for_bit(prepared, tmp_path):
    config = get_symmetric_quantization_config(is_per_channel=True)
    fresh = prepare_pt2e(export(ConvNet(), torch.randn(2, 3, 16, 16)), XNNPACKQuantizer(config))
    for _ in range(3):
        prepared(torch.randn(2, 3, 16, 16))
    torch.save(prepared.state_dict(), tmp_path / "state.pt")
    fresh.load_state_dict(torch.load(tmp_path / "state.pt"), strict=True)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(convert_pt2e(fresh)(x), convert_pt2e(prepared)(x))
    assert explain(convert_pt2e(fresh)).groups == explain(convert_pt2e(prepared)).groups


def test_a_converted_model_is_saved_with_its_integers_and_loads_in_a_fresh_process(prepared, tmp_path):
    x = torch.randn(2, 3, 16, 16)
    prepared(x)
    converted = convert_pt2e(prepared)
    with torch.no_grad():
        torch.save(((x,), converted(x)), tmp_path / "values.pt")
        torch.export.save(torch.export.export(converted, (x,)), tmp_path / "model.pt2")
    assert run(LOAD, tmp_path / "model.pt2", tmp_path / "values.pt").split() == ["True", "3"]
