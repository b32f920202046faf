"""lower_to_inductor: two modes, a package that torch alone runs, errors instead of float kernels, no traces left."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn
from torch.export import Dim

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.errors import CaptureError, LoweringError
from pt2e_quant.lowering.inductor import lower_to_inductor
from pt2e_quant.lowering.inductor.remarks import remarks_on
from quantizers.x86_inductor import X86InductorQuantizer
from tests.nets import MLP, export
from tests.x86.x86_rows import RECIPES, Net, converted

Q = torch.ops.quantized_decomposed


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(10, 16)
        self.down = nn.Linear(16, 6, bias=False)

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
        y = self.down(torch.relu(self.up(x)))
        return {"scaled": y * scale, "plain": y}


class Branches(nn.Module):
    """Integer linears outside and inside of torch.cond."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.small, self.large = nn.Linear(48, 64), nn.Linear(64, 64, bias=False), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        return torch.cond(y.mean() > 0.4, lambda t: self.large(t) + t, lambda t: self.small(t), (y,))


@pytest.fixture(scope="module")
def mlp():
    torch.manual_seed(0)
    return converted(MLP(), (torch.randn(2, 3, 10),), dynamic_shapes=({0: Dim("batch", min=1, max=9)},))


@pytest.fixture(scope="module")
def package(mlp, tmp_path_factory):
    program = lower_to_inductor(mlp, mode="aoti")
    return program, program.save(tmp_path_factory.mktemp("aoti") / "mlp.pt2")


def test_a_package_runs_in_a_process_with_torch_alone(package, mlp, tmp_path):
    _, path = package
    x = torch.randn(5, 3, 10)
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch; model = torch._inductor.aoti_load_package(sys.argv[1])\n"
        "torch.save(model(torch.load(sys.argv[2])), sys.argv[3])\n"
        "print(any(name.split('.')[0] in ('pt2e_quant', 'quantizers', 'torchao') for name in sys.modules))"
    )
    out = tmp_path / "y.pt"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(tmp_path / "x.pt"), str(out)],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout.strip() == "False"
    torch.testing.assert_close(torch.load(out), mlp(x), atol=1e-6, rtol=1e-6)


def test_the_code_of_a_package_calls_the_integer_kernels(package):
    """pytorch/ao#4566: none there unless the weights are frozen, which Inductor does in no_grad only."""
    program, path = package
    with zipfile.ZipFile(path) as archive:
        code = "".join(archive.read(name).decode() for name in archive.namelist() if name.endswith(".wrapper.cpp"))
    assert len(re.findall(r"AOTI_TORCH_ERROR_CODE_CHECK\(\w*qlinear_pointwise\w*\(", code)) == len(program.kernels) == 2


@pytest.mark.parametrize("batch", [1, 9])
def test_a_package_runs_here_too_with_the_smallest_and_the_largest_batch(package, mlp, batch):
    program, _ = package
    x = torch.randn(batch, 3, 10)
    torch.testing.assert_close(program(x), mlp(x), atol=1e-6, rtol=1e-6)


def test_a_size_out_of_range_is_refused(package):
    program, _ = package
    with pytest.raises(LoweringError, match=r"x: float32\[1\.\.9, 3, 10\], got float32\[10, 3, 10\]"):
        program(torch.randn(10, 3, 10))


def test_another_dtype_is_refused(package):
    with pytest.raises(LoweringError, match="got float64"):
        package[0](torch.randn(2, 3, 10, dtype=torch.float64))


@pytest.fixture(scope="module")
def keywords():
    torch.manual_seed(0)
    model, example = Keywords().eval(), (torch.randn(4, 10), {"scale": torch.randn(1)})
    exported = torch.export.export(model, example[:1], example[1])
    prepared = prepare_pt2e(exported, X86InductorQuantizer().set_global(RECIPES["static"]))
    prepared(example[0], **example[1])
    graph = convert_pt2e(prepared)
    before = torch._inductor.config.save_config_portable()
    program = lower_to_inductor(graph)
    return graph, program, before == torch._inductor.config.save_config_portable()


def test_a_program_is_called_and_answers_like_the_model(keywords):
    graph, program, _ = keywords
    x, scale = torch.randn(4, 10), torch.tensor([3.0])
    wanted, found = graph(x, scale=scale), program(x, scale=scale)
    assert list(found) == ["scaled", "plain"]
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    assert not found["plain"].requires_grad


def test_the_configuration_of_inductor_stays_as_it_was(keywords):
    assert keywords[2]


def test_the_account_is_plain_data_and_text(keywords):
    _, program, _ = keywords
    data = json.loads(program.to_json())
    assert [(kernel["op"], kernel["fused"]) for kernel in data["kernels"]] == [
        ("aten.linear.default", ["quantize"]),  # which saturates where relu clamps
        ("aten.linear.default", []),
    ]
    assert data["fallbacks"] == []
    assert "linear (aten.linear.default): onednn.qlinear_pointwise + quantize, int8" in program.text()
    assert program.count("int8") == 2


def test_a_compiled_program_cannot_be_saved(keywords, tmp_path):
    with pytest.raises(LoweringError, match="mode='aoti'"):
        keywords[1].save(tmp_path / "model.pt2")


class PerTensorWeight(nn.Module):
    """What XNNPACKQuantizer makes by default: one scale for the whole weight, which Inductor's patterns pass over."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randint(-127, 128, (6, 10), dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        codes = Q.quantize_per_tensor.default(x, 0.03, 128, 0, 255, torch.uint8)
        y = Q.dequantize_per_tensor.default(codes, 0.03, 128, 0, 255, torch.uint8)
        return nn.functional.linear(y, Q.dequantize_per_tensor.default(self.codes, 0.01, 0, -127, 127, torch.int8))


def test_an_operator_that_fell_back_to_float_is_an_error_unless_allowed():
    graph = torch.export.export(PerTensorWeight(), (torch.randn(3, 10),)).module()
    with pytest.raises(LoweringError, match="one scale in all") as caught:
        lower_to_inductor(graph, (torch.randn(3, 10),))
    assert "allow_float=True" in str(caught.value)
    program = lower_to_inductor(graph, (torch.randn(3, 10),), allow_float=True)
    assert [(fallback.node, program.count("float")) for fallback in program.fallbacks] == [("linear", 1)]
    x = torch.randn(3, 10)
    torch.testing.assert_close(program(x), graph(x))


def test_a_model_must_be_exported():
    with pytest.raises(CaptureError, match="lower_to_inductor takes a converted graph"):
        lower_to_inductor(MLP())


def test_a_mode_must_be_known(mlp):
    with pytest.raises(LoweringError, match="mode must be one of 'compile', 'aoti', got 'jit'"):
        lower_to_inductor(mlp, mode="jit")


def test_a_processor_without_vnni_is_remarked_on(mlp, monkeypatch):
    assert remarks_on(mlp) == [] or not torch.cpu._is_vnni_supported()
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert {remark.node for remark in remarks_on(mlp) if "reduce_range=True" in remark.text} == {
        "linear", "linear_1",
    }  # fmt: skip
    reduced = converted(MLP(), (torch.randn(2, 3, 10),), "reduced")
    assert remarks_on(reduced) == []


@pytest.mark.slow
def test_autotuning_computes_the_same():
    x = torch.randn(64, 10)
    graph = converted(MLP(), (x,))
    program = lower_to_inductor(graph, autotune=True)
    torch.testing.assert_close(program(x), graph(x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("mode", ["compile", pytest.param("aoti", marks=pytest.mark.slow)])
def test_a_profile_names_every_kernel(mode):
    model = Net(lambda n, x: n.b(n.a(x).relu()).sigmoid(), a=nn.Conv2d(6, 16, 1), b=nn.Conv2d(16, 5, 3, groups=1))
    x = torch.randn(2, 6, 9, 7)
    profile = lower_to_inductor(converted(model, (x,)), mode=mode, profile=True).profile(x, runs=4)
    calls = {kernel.kernel: kernel.calls for kernel in profile.kernels}
    assert calls.pop("qconv_pointwise") == 2
    assert all(name.startswith("loop: ") for name in calls)
    assert sum(kernel.microseconds for kernel in profile.kernels) > 0
    assert "outside of kernels" in profile.text()


@pytest.mark.slow
def test_a_profile_needs_the_names_of_kernels():
    x = torch.randn(3, 10)
    with pytest.raises(LoweringError, match="profile=True"):
        lower_to_inductor(converted(MLP(), (x,)), allow_float=True).profile(x)


@pytest.mark.slow
def test_autotuned_convolutions_of_size_one_are_linears():
    model = Net(lambda n, x: n.b(n.a(x).relu()), a=nn.Conv2d(6, 16, 1), b=nn.Conv2d(16, 5, 3, padding="same"))
    x = torch.randn(2, 6, 9, 7)
    graph = converted(model, (x,))
    program = lower_to_inductor(graph, autotune=True)
    assert [kernel.kernel for kernel in program.kernels] == ["onednn.qlinear_pointwise", "onednn.qconv_pointwise"]
    torch.testing.assert_close(program(x), graph(x), atol=1e-6, rtol=1e-6)


@pytest.mark.slow
def test_autotuning_takes_linears_with_qparams_of_run_time():
    """With these as float64 and int64, Inductor's templates damage the heap, and the process ends."""
    model = nn.Sequential(nn.Linear(64, 96), nn.Sigmoid(), nn.Linear(96, 64))
    x = torch.randn(128, 64)
    graph = converted(model, (x,), "dynamic")
    tuned, plain = lower_to_inductor(graph, autotune=True), lower_to_inductor(graph)
    torch.testing.assert_close(tuned(x), plain(x), atol=1e-6, rtol=1e-6)


class Numbers(nn.Module):
    """Convolutions that stay in float, each scaled or shifted by another number."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 3, padding="same", groups=2, bias=i < 3) for i in range(4))
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        one, two, three, four = self.layers
        x = torch.relu(torch.add(x, one(x), alpha=0.1))
        x = torch.relu(x + 0.7 * two(x))
        x = torch.relu(x - three(x) / 1.5) + (four(x) - 0.3)
        return self.up(x) + 0.25


def test_numbers_beside_float_convolutions_are_folded_each_by_itself():
    """torch 2.13's Inductor keeps them under one name: it computes 0.16 off where values are about 1."""
    torch.manual_seed(0)
    model, x = Numbers().eval(), torch.randn(1, 8, 6, 6)
    program = lower_to_inductor(torch.export.export(model, (x,)))
    with torch.no_grad():
        torch.testing.assert_close(program(x), model(x), atol=1e-5, rtol=1e-5)  # float32 in another order


@pytest.mark.slow
def test_rounding_that_no_integer_kernel_reads_is_dropped_with_a_remark():
    model, x = Net(lambda n, x: n.a(x) @ x.transpose(1, 2), a=nn.Linear(6, 6)), torch.randn(2, 4, 6)
    quantizer = X86InductorQuantizer().set_global(RECIPES["static"])
    prepared = prepare_pt2e(export(model, x), quantizer.set_function_type_qconfig(torch.matmul, RECIPES["static"]))
    prepared(x)
    graph = convert_pt2e(prepared)
    program = lower_to_inductor(graph)
    assert {remark.text for remark in program.remarks} == {"no integer kernel reads it, so it was dropped"}
    assert [kernel.op for kernel in program.kernels] == ["aten.linear.default"]
    wanted = model.a(x) @ x.transpose(1, 2)
    assert (program(x) - wanted).abs().max() <= (graph(x) - wanted).abs().max()


def test_linears_of_a_branch_are_named_as_the_float_kernels_that_they_become():
    torch.manual_seed(1)
    x = torch.randn(32, 48)
    with torch.no_grad():  # torch.export of a cond warns of gradients
        prepared = prepare_pt2e(export(Branches(), x), X86InductorQuantizer().set_global(RECIPES["static"]))
        for branch in (x, x * 0.1, x * 4):
            prepared(branch)
        graph = convert_pt2e(prepared)
    program = lower_to_inductor(graph, allow_float=True)
    assert [(kernel.node, kernel.precision) for kernel in program.kernels] == [("linear", "int8")]
    assert [left.node for left in program.fallbacks] == ["true_graph_0.linear", "false_graph_0.linear"]
    assert all("nested graph" in left.reason and "it became aten." in left.reason for left in program.fallbacks)
    for branch in (x, x * 0.1):
        torch.testing.assert_close(program(branch), graph(branch), atol=1e-5, rtol=1e-5)  # sums in another order
    with pytest.raises(LoweringError, match=r"2 quantized operators fell back(.|\n)*true_graph_0.linear"):
        lower_to_inductor(graph)
