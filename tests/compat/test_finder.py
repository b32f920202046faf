"""Programs for torch.ao.quantization get our modules by their imports, also where torch has none of its own."""

from __future__ import annotations

import importlib
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pt2e_quant.quantization
from pt2e_quant.compat import install, is_installed, uninstall
from pt2e_quant.compat.__main__ import main
from pt2e_quant.compat.aliases import ALIASES
from pt2e_quant.errors import LegacyImportError
from pt2e_quant.nn import quantized
from pt2e_quant.observer import MinMaxObserver

pytestmark = pytest.mark.filterwarnings("ignore")  # torch announces the end of what is imported here
ROOT = Path(__file__).parents[2]


def without_torch_ao(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.compat.blocked", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def installed() -> Iterator[None]:
    install()
    yield
    uninstall()


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("old") / "old.pt"
    torch.save(torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(torch.nn.Linear(3, 2))), file)
    done = without_torch_ao("walk", str(file))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_name_of_the_reference_is_there_without_torchs(walked):
    assert walked["names"] + walked["modules"] == []


def test_an_old_checkpoint_loads_without_torchs(walked):
    assert "DynamicQuantizedLinear(in_features=3, out_features=2" in walked["loaded"]


def test_a_program_for_the_old_roots_runs_without_torchs():
    done = without_torch_ao("run", "-m", "tests.compat.program", "its", "arguments")
    assert done.stdout == "done its arguments\n", done.stderr


def test_a_script_is_run_as_python_would(tmp_path, monkeypatch, capsys):
    script = tmp_path / "tool.py"
    script.write_text("import sys, torch.nn.quantized as q\nprint(q.Linear.__module__, sys.argv[1:], sys.path[0])")
    monkeypatch.setattr(sys, "argv", ["compat"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    try:
        main([str(script), "x"])
    finally:
        uninstall()
    assert capsys.readouterr().out == f"pt2e_quant.nn.weighted ['x'] {tmp_path}\n"


@pytest.mark.usefixtures("installed")
def test_attributes_and_submodules_are_ours():
    from torch.ao.nn.intrinsic import ConvReLU2d, _FusedModule
    from torch.ao.nn.quantized.modules.linear import LinearPackedParams
    from torch.ao.quantization.quantization_mappings import DEFAULT_MODULE_TO_ACT_POST_PROCESS

    assert torch.ao.quantization.MinMaxObserver is MinMaxObserver
    assert torch.nn.quantized.Linear is quantized.Linear
    assert torch.ao.quantization.observer.MinMaxObserver is MinMaxObserver
    assert LinearPackedParams is quantized.modules.LinearPackedParams
    assert issubclass(ConvReLU2d, _FusedModule)
    assert torch.nn.Sigmoid in DEFAULT_MODULE_TO_ACT_POST_PROCESS


@pytest.mark.usefixtures("installed")
def test_a_function_hides_the_file_of_its_name():
    """As in the reference, where `fuse_modules` is a file, and a function that the package has from it."""
    from torch.ao.quantization.fuse_modules import fuse_modules

    assert torch.ao.quantization.fuse_modules is fuse_modules


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("line", "nearest"),
    [
        ("from torch.ao.quantization import fuse_module", "'fuse_modules'"),
        ("import torch.ao.nn.quantised", "'quantized'"),
        ("from torch.nn.quantized import Conv4d", "'Conv3d'"),
    ],
)
def test_a_name_that_nobody_has_is_an_error_with_the_nearest_one(line, nearest):
    with pytest.raises(LegacyImportError, match=f"Did you mean {nearest}") as caught:
        exec(line)
    assert isinstance(caught.value, ImportError)  # what programs with a fallback catch


@pytest.mark.usefixtures("installed")
def test_an_attribute_that_nobody_has_is_an_attribute_error():
    assert not hasattr(torch.ao.quantization, "no_such_name")
    with pytest.raises(AttributeError, match="Did you mean 'quantize_dynamic'"):
        _ = torch.quantization.quantise_dynamic


@pytest.mark.usefixtures("installed")
def test_what_torch_itself_imports_stays_torchs():
    from torch.ao.quantization.fx import _decomposed
    from torch.ao.quantization.utils import calculate_qmin_qmax

    importlib.import_module("torch._export.passes.replace_quantized_ops_with_standard_ops_pass")
    importlib.import_module("torch.testing._internal.common_quantization")  # it asks for names that we lack
    assert "site-packages" in _decomposed.__file__
    assert calculate_qmin_qmax(0, 255, True, torch.quint8, False) == (0, 255)


@pytest.mark.usefixtures("installed")
def test_an_old_pickle_by_name_is_ours():
    assert pickle.loads(b"ctorch.ao.nn.quantized.modules.conv\nConv2d\n.") is quantized.Conv2d


def test_uninstall_gives_back_what_torch_has():
    modules = {name: sys.modules[name] for name in ALIASES if name in sys.modules}
    theirs = torch.nn.quantized.Linear
    for _ in range(2):  # twice is once
        install()
    assert is_installed()
    for _ in range(2):
        uninstall()
    assert torch.nn.quantized.Linear is theirs
    assert {name: sys.modules[name] for name in ALIASES if name in sys.modules} == modules
    assert not is_installed()


def test_one_module_has_every_name_and_says_its_home():
    names = pt2e_quant.quantization
    assert names.quantize_dynamic is pt2e_quant.eager.quantize_dynamic
    assert names.find_home("MinMaxObserver") == "pt2e_quant.observer"
    assert names.find_home("no_such_name") is None
