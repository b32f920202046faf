"""A prepared model trains like any other module: what the loops of others do to modules works, and changes nothing."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.fx import GraphModule
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from pt2e_quant import (
    check_converted,
    convert_pt2e,
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
    freeze_bn_stats,
    prepare_qat_pt2e,
)
from pt2e_quant.fake_quantize import toggle_range_learning
from pt2e_quant.graph.module import ExportedModule
from pt2e_quant.quantizer import with_learned_scales
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.nets import ConvNet, export
from tests.qat.kit import images, prepared, settle

SHAPE = (4, 3, 16, 16)
BATCHES = [images(seed, *SHAPE) for seed in range(4)]


def convnet() -> GraphModule:
    torch.manual_seed(0)
    return prepared(ConvNet(), BATCHES[0], train=True)


def step(model: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, x: Tensor) -> float:
    optimizer.zero_grad()
    loss = (model(x).float() - 1).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def different(first: nn.Module, second: nn.Module, rtol: float = 0.0, atol: float = 0.0) -> list[str]:
    theirs = second.state_dict()
    return [
        name
        for name, value in first.state_dict().items()
        if not torch.allclose(value.double(), theirs[name].double(), rtol=rtol, atol=atol)
    ]


def trained_twice(
    other: Callable[[GraphModule], Callable[[Tensor], Tensor]], make: Callable[[], GraphModule] = convnet
) -> tuple[nn.Module, nn.Module]:
    """One trained as it is, one through what `other` makes of it; dropout draws the same for both."""
    models = make(), make()
    for model, run in zip(models, (models[0], other(models[1])), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)  # before the first forward
        for seed, x in enumerate(BATCHES):
            torch.manual_seed(seed)
            step(run, optimizer, x)
    return models


# --- numbers of fewer bits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_and_converts(dtype):
    """Losses lie within what 8 bits of a mantissa, or 11, leave of those in float32: rounding of 1 in 2 ** 8."""
    losses = {}
    for enabled in (False, True):
        model = convnet()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16 and enabled)
        found = []
        for seed, x in enumerate(BATCHES):
            torch.manual_seed(seed)
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=enabled):
                loss = (model(x).float() - 1).square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            scaler.step(optimizer)
            scaler.update()
            found.append(loss.item())
        losses[enabled] = found
        check_converted(settle(model), convert_pt2e(model), BATCHES[:1])
    assert losses[True][0] == pytest.approx(losses[False][0], rel=0.05)
    assert losses[True][-1] < losses[True][0] / 2


# --- less memory, more speed ----------------------------------------------------------------------------------------


def test_checkpointing_gives_the_same_gradients_and_observes_once():
    """Bit for bit. Statistics of batch norms are frozen: torch itself moves them twice under checkpointing."""

    def checkpointed(model: GraphModule) -> Callable[[Tensor], Tensor]:
        return lambda x: checkpoint(model, x, use_reentrant=False)

    def frozen(other: Callable[[GraphModule], Callable[[Tensor], Tensor]]) -> Callable[[GraphModule], object]:
        return lambda model: (freeze_bn_stats(model), other(model))[1]

    models = convnet(), convnet()
    for model, other in zip(models, (frozen(lambda m: m), frozen(checkpointed)), strict=True):
        run, optimizer = other(model), torch.optim.SGD(model.parameters(), lr=0.05)
        for seed, x in enumerate(BATCHES):
            torch.manual_seed(seed)
            step(run, optimizer, x)
    assert different(*models) == []


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@inductor_config.patch(fallback_random=True)  # or dropout draws other numbers than in eager mode
def test_a_compiled_model_is_one_graph_and_trains_to_the_same_state(backend):
    """Compiled once, for all batches; switches and first batches are values, not code."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    runs = []

    def compiling(model: GraphModule) -> Callable[[Tensor], Tensor]:
        runs.append(torch.compile(model, backend=backend, fullgraph=True))
        return runs[0]

    plain, compiled = trained_twice(compiling)
    assert different(plain, compiled, rtol=1e-4, atol=1e-5) == []  # float32, summed in another order over four steps
    for switch in (disable_observer, disable_fake_quant):
        outputs = []
        for model, run in ((plain, plain), (compiled, runs[0])):
            switch(model)
            torch.manual_seed(0)
            outputs.append(run(BATCHES[0] * 3))
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    assert different(plain, compiled, rtol=1e-4, atol=1e-5) == []
    assert counters["stats"]["unique_graphs"] == 1
    enable_fake_quant(compiled)
    check_converted(settle(compiled), convert_pt2e(compiled), BATCHES[:1])


@pytest.mark.parametrize("learning", [False, True])
@inductor_config.patch(fallback_random=True)
def test_a_compiled_model_trains_its_scales_while_batch_norms_move(learning):
    """The same gradients: backward reads the scales of before the batch norms moved, in whatever parts they compile."""

    def make() -> GraphModule:
        torch.manual_seed(0)
        config = with_learned_scales(get_symmetric_quantization_config(is_per_channel=True))
        exported = export(ConvNet(), BATCHES[0], train=True)
        model = prepare_qat_pt2e(exported, XNNPACKQuantizer().set_global(config), calibration=BATCHES[:1])
        toggle_range_learning(model, learning)
        return model

    torch._dynamo.reset()
    plain, compiled = trained_twice(lambda model: torch.compile(model, backend="aot_eager", fullgraph=True), make)
    assert different(plain, compiled, rtol=1e-4, atol=1e-5) == []
    assert any(name.endswith(".scale") for name in different(plain, make())) == learning


def test_compiled_code_holds_for_one_mode():
    """train(), eval() and freeze_bn_stats write literals of the graph, which code compiled before does not see."""
    torch._dynamo.reset()
    model, x = convnet().train(), BATCHES[0]
    run = torch.compile(model, backend="eager", fullgraph=True)
    run(x)
    disable_observer(model)
    for change in (ExportedModule.eval, ExportedModule.train, freeze_bn_stats):
        change(model)
        plain, outputs = copy.deepcopy(model), []
        for one in (run, plain):
            torch.manual_seed(0)
            outputs.append(one(x))
        torch.testing.assert_close(*outputs)
        assert different(model, plain) == []


# --- what loops do to modules ---------------------------------------------------------------------------------------


def test_a_moving_average_of_the_model_converts():
    model = convnet()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    expected = model.get_parameter("head.weight").detach().clone()
    for count, x in enumerate(BATCHES):
        step(model, optimizer, x)
        average.update_parameters(model)
        latest = model.get_parameter("head.weight").detach()
        expected = latest.clone() if count == 0 else expected.lerp(latest, 0.5)
    torch.testing.assert_close(average.module.get_parameter("head.weight").detach(), expected)
    assert average.module.activation_post_process_3.observer_enabled.dtype is torch.uint8
    check_converted(settle(average.module), convert_pt2e(average.module), BATCHES[:1])


def test_a_data_loader_and_clipped_gradients():
    model = convnet()
    loader = DataLoader(TensorDataset(torch.cat(BATCHES)), batch_size=4, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for (x,) in loader:
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        assert float(torch.stack(norms).norm()) <= 0.1 + 1e-6
        optimizer.step()


RESUME = """
import sys, torch
from tests.qat.test_ecosystem import BATCHES, convnet, step
saved = torch.load(sys.argv[1], weights_only=True)
model = convnet()
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
model.load_state_dict(saved["model"])
optimizer.load_state_dict(saved["optimizer"])
torch.set_num_threads(1)
torch.set_rng_state(saved["random"])
for x in BATCHES[2:]:
    step(model, optimizer, x)
torch.save(model.state_dict(), sys.argv[1] + ".resumed")
"""


@pytest.mark.slow
def test_training_resumes_in_a_new_process_bit_by_bit(tmp_path):
    model, path = convnet(), tmp_path / "checkpoint"
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for x in BATCHES[:2]:
        step(model, optimizer, x)
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}, path
    )
    for x in BATCHES[2:]:
        step(model, optimizer, x)
    subprocess.run([sys.executable, "-c", RESUME, str(path)], check=True, cwd=Path(__file__).parents[2])
    resumed = torch.load(f"{path}.resumed", weights_only=True)
    assert [name for name, value in model.state_dict().items() if not torch.equal(value, resumed[name])] == []


@pytest.mark.slow  # its import alone takes seconds
def test_a_loop_of_lightning_trains_it(tmp_path):
    lightning = pytest.importorskip("pytorch_lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = convnet()

        def training_step(self, batch: list[Tensor]) -> Tensor:
            return (self.model(batch[0]) - 1).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    classifier, alone = Classifier(), convnet()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, gradient_clip_val=5.0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on workers and logging
        torch.manual_seed(0)
        trainer.fit(classifier, DataLoader(TensorDataset(torch.cat(BATCHES)), batch_size=4))
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.05)
    torch.manual_seed(0)
    for x in BATCHES:
        optimizer.zero_grad()
        (alone(x) - 1).square().mean().backward()
        nn.utils.clip_grad_norm_(alone.parameters(), 5.0)
        optimizer.step()
    assert range_of_the_input(classifier.model) == range_of_the_input(alone)
    check_converted(settle(classifier.model), convert_pt2e(classifier.model), BATCHES[:1])


def range_of_the_input(model: nn.Module) -> tuple[float, float]:
    """An average over all batches, which depends neither on dropout nor on weights."""
    observer = model.get_submodule("activation_post_process_3.activation_post_process")
    return observer.min_val.item(), observer.max_val.item()


def test_a_loop_of_accelerate_trains_it():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model = convnet()
    before = model.get_parameter("head.weight").detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loader = DataLoader(TensorDataset(torch.cat(BATCHES)), batch_size=4)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for (x,) in loader:
        with accelerator.accumulate(wrapped):
            accelerator.backward((wrapped(x) - 1).square().mean())
            accelerator.clip_grad_norm_(wrapped.parameters(), 5.0)
            optimizer.step()
            optimizer.zero_grad()
    trained = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    assert trained is model
    assert not torch.equal(before, model.get_parameter("head.weight"))
    check_converted(settle(model), convert_pt2e(model), BATCHES[:1])
