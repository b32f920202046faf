"""Training in eager mode beside torch.ao's: classes, state dicts, losses, what is converted; batch norm's formula."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from pt2e_quant.eager import (
    DeQuantStub,
    QuantStub,
    convert,
    embedding_qat_mapping,
    fuse_modules_qat,
    prepare_qat,
    quantize_qat,
)
from pt2e_quant.errors import ConversionError, QuantizedTensorError
from pt2e_quant.nn import intrinsic, qat, quantized
from pt2e_quant.nn.quantized import dynamic
from pt2e_quant.nn.rows import float_class, qat_classes
from pt2e_quant.qconfig import (
    default_dynamic_qat_qconfig,
    default_embedding_qat_qconfig,
    default_qat_qconfig,
    get_default_qat_qconfig,
)

X = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 4
ROWS = [["conv1", "bn1", "relu1"], ["conv2", "bn2"], ["fc1", "relu2"], ["fc2", "bn3"]]


class Net(nn.Module):
    def __init__(self, stubs: Any = (QuantStub, DeQuantStub)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.quant, self.dequant = (kind() for kind in stubs)
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8)
        self.fc1, self.relu2, self.fc2, self.bn3 = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Any:
        x = self.relu1(self.bn1(self.conv1(self.quant(x))))
        x = self.bn2(self.conv2(x)).mean((2, 3))
        return self.dequant(self.bn3(self.fc2(self.relu2(self.fc1(x)))))


def train(model: nn.Module, steps: int = 20) -> list[float]:
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(X), Y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def prepared() -> Any:
    model = fuse_modules_qat(Net().train(), ROWS)
    model.qconfig = get_default_qat_qconfig("x86")  # type: ignore[assignment]
    return prepare_qat(model)


def peers() -> Any:
    import torch.ao.quantization as theirs

    torch.backends.quantized.engine = "x86"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's modules and types are deprecated
        model = theirs.fuse_modules_qat(Net((theirs.QuantStub, theirs.DeQuantStub)).train(), ROWS)
        model.qconfig = theirs.get_default_qat_qconfig("x86")
        return theirs.prepare_qat(model), theirs.convert


def classes(model: nn.Module) -> dict[str, str]:
    return {n: type(m).__name__ for n, m in model.named_modules() if "_packed_params" not in n}


@pytest.mark.filterwarnings("ignore")
def test_classes_state_dicts_losses_and_outputs_are_the_peers() -> None:
    ours, (theirs, convert_theirs) = prepared(), peers()
    assert classes(ours) == classes(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    wanted = train(theirs)
    assert train(ours) == pytest.approx(wanted, abs=1e-4)
    ours.load_state_dict(theirs.state_dict())  # so that the same is converted
    made, other = convert(ours.eval()), convert_theirs(theirs.eval())
    assert classes(made) == classes(other)
    step = float(other.fc2.scale)
    assert (made(X) - other(X)).abs().max() <= 2 * step  # one of the last layer, one that earlier ties lead to


def test_what_is_converted_is_what_was_trained() -> None:
    model = prepared()
    train(model, 5)
    model.eval()
    wanted = model(X)
    made = convert(model)
    assert (made(X) - wanted).abs().max() <= 2 * made.fc2.scale  # type: ignore[operator,union-attr]


KEPT: dict[str, Any] = {
    "Linear": lambda: nn.Linear(4, 4), "Conv1d": lambda: nn.Conv1d(4, 4, 2), "Conv2d": lambda: nn.Conv2d(4, 4, 2),
    "Conv3d": lambda: nn.Conv3d(4, 4, 2), "BatchNorm1d": lambda: nn.BatchNorm1d(4),
    "BatchNorm2d": lambda: nn.BatchNorm2d(4), "BatchNorm3d": lambda: nn.BatchNorm3d(4), "ReLU": nn.ReLU,
    "Embedding": lambda: nn.Embedding(10, 4), "EmbeddingBag": lambda: nn.EmbeddingBag(10, 4),
}  # fmt: skip


def float_module(name: str) -> Any:
    kind: Any = float_class(name)
    parts: list[Any] = [KEPT[part.__name__]() for part in getattr(kind, "parts", ())]
    made: Any = kind(*parts) if parts else KEPT[name]()
    made.qconfig = default_embedding_qat_qconfig if "Embedding" in name else get_default_qat_qconfig("x86")
    return made


def an_input(name: str) -> Tensor:
    if "Embedding" in name:
        return torch.arange(6).reshape(2, 3)
    dims = int(name[-2]) if name[-1] == "d" and "Linear" not in name else 0
    return torch.randn(5, 4, *[3] * dims, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", qat_classes())
def test_each_class_is_the_float_module_while_it_does_not_round(name: str) -> None:
    torch.manual_seed(0)
    module = float_module(name)
    made: Any = qat_classes()[name].from_float(copy.deepcopy(module))  # type: ignore[attr-defined]
    made.weight_fake_quant.disable_fake_quant()
    x = an_input(name)
    torch.testing.assert_close(made(x), module(x))
    torch.testing.assert_close(made.eval()(x), module.eval()(x))
    torch.testing.assert_close(made.to_float()(x), module(x))


@pytest.mark.parametrize("name", [name for name in qat_classes() if "Bn" in name])
def test_evaluation_computes_with_the_folded_and_rounded_weight(name: str) -> None:
    torch.manual_seed(0)
    module = float_module(name)
    module(an_input(name))
    made: Any = qat_classes()[name].from_float(module).eval()  # type: ignore[attr-defined]
    x, folded = an_input(name), made.to_float()
    product: Any = folded[0] if isinstance(folded, nn.Sequential) else folded
    made(x)
    product.weight.data = made.weight_fake_quant(product.weight.data)
    torch.testing.assert_close(made(x), folded(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in qat_classes() if name != "Embedding"])
def test_state_dicts_go_both_ways_between_peers(name: str) -> None:
    import torch.ao.nn as theirs

    kind = type(float_module(name)).__name__
    room = theirs.intrinsic if "intrinsic" in name else torch.nn
    peer: Any = float_module(name)
    if "intrinsic" in name:
        peer = getattr(room, kind)(*peer)
    peer.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    if "Embedding" in name:
        peer.qconfig = torch.ao.quantization.default_embedding_qat_qconfig
    if "intrinsic" in name:
        peer[0].qconfig = peer.qconfig
    twin = getattr(theirs.intrinsic.qat if "intrinsic" in name else theirs.qat, kind).from_float(peer)
    ours: Any = qat_classes()[name].from_float(float_module(name))  # type: ignore[attr-defined]
    x = an_input(name)
    twin(x)
    ours.load_state_dict(twin.state_dict())
    # the largest weight of a channel is 127.5 steps, a tie; rounded the other way, it is a step off
    step = 0.0 if "Embedding" in name else float(ours.weight_fake_quant.scale.max() * x.abs().max())
    if "Bn" in name:
        step /= float(twin.bn.running_var.min().sqrt())
    torch.testing.assert_close(ours.eval()(x), twin.eval()(x), atol=1e-5 + step, rtol=1e-5)
    twin.load_state_dict(ours.state_dict())


def test_frozen_statistics_stay_through_train() -> None:
    model = prepared()
    model(X)
    model.apply(intrinsic.qat.freeze_bn_stats).train()
    before = model.conv1.bn.running_mean.clone()
    model(X)
    assert torch.equal(model.conv1.bn.running_mean, before)
    model.apply(intrinsic.qat.update_bn_stats)
    model(X)
    assert not torch.equal(model.conv1.bn.running_mean, before)


def test_a_batch_norm_begins_anew() -> None:
    model = prepared()
    model(X)
    model.conv1.bn.weight.data.fill_(3.0)
    model.conv1.reset_bn_parameters()
    fresh = nn.BatchNorm2d(model.conv1.bn.num_features).state_dict()
    assert all(torch.equal(value, model.conv1.bn.state_dict()[name]) for name, value in fresh.items())


def test_a_state_dict_of_version_1_loads() -> None:
    made: Any = intrinsic.qat.ConvBn2d(3, 4, 1, qconfig=default_qat_qconfig)
    state = made.state_dict()
    old = {
        name.replace("bn.weight", "gamma").replace("bn.bias", "beta").replace("bn.", ""): v for name, v in state.items()
    }
    old["gamma"] = torch.full((4,), 3.0)
    made.load_state_dict(old)
    assert made.bn.weight.tolist() == [3.0] * 4


def test_a_channel_whose_gamma_is_zero_trains() -> None:
    """As in residual blocks that start as the identity; torch.ao divides 0 by 0 there."""
    module: Any = float_module("intrinsic.ConvBn2d")
    nn.init.zeros_(module[1].weight)
    made = intrinsic.qat.ConvBn2d.from_float(module)
    made(an_input("Conv2d")).sum().backward()
    assert made.weight.grad.isfinite().all()
    assert made.bn.weight.grad.isfinite().all()


def test_embeddings_train_with_their_own_mapping() -> None:
    model: Any = nn.Sequential(nn.EmbeddingBag(10, 4), nn.Linear(4, 2)).train()
    model[0].qconfig, model[1].qconfig = default_embedding_qat_qconfig, None
    tokens = torch.arange(10).reshape(2, 5)
    made: Any = prepare_qat(model, embedding_qat_mapping())
    assert isinstance(made[0], qat.EmbeddingBag)
    wanted = made(tokens)
    done: Any = convert(made.eval())
    assert isinstance(done[0], quantized.EmbeddingBag)
    torch.testing.assert_close(done(tokens), wanted)


def test_dynamic_linears_train_on_the_range_of_each_input() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 2)).train()
    model.qconfig = default_dynamic_qat_qconfig
    made: Any = prepare_qat(model, {nn.Linear: qat.dynamic.Linear})
    x = torch.randn(5, 4)
    wanted = made(x)
    done: Any = convert(made.eval(), {qat.dynamic.Linear: dynamic.Linear})
    # torch's qconfig leaves a bit of the input unused, nn.quantized.dynamic does not
    torch.testing.assert_close(done(x), wanted, atol=float(x.abs().max() / 64), rtol=0)
    with pytest.raises(QuantizedTensorError, match="averaging_constant=1"):
        qat.dynamic.Linear(3, 3, qconfig=default_qat_qconfig)


def test_parametrized_weights_stay_so() -> None:
    model: Any = nn.Sequential(QuantStub(), parametrizations.weight_norm(nn.Linear(4, 4)), DeQuantStub()).train()
    model.qconfig = default_qat_qconfig
    made: Any = prepare_qat(model)
    assert nn.utils.parametrize.is_parametrized(made[1], "weight")
    x = torch.randn(3, 4)
    assert (made(x) - model(x)).abs().max() < 0.2  # steps of 7 bits
    assert isinstance(convert(made.eval())[1], quantized.Linear)  # type: ignore[index]


def test_all_steps_in_one_call() -> None:
    model = fuse_modules_qat(Net().train(), ROWS)
    model.qconfig = default_qat_qconfig  # type: ignore[assignment]
    made: Any = quantize_qat(model, train, [2])
    assert isinstance(made.fc2, quantized.Linear)
    assert isinstance(model.conv1, intrinsic.ConvBnReLU2d)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda: prepare_qat(Net().eval()), ConversionError, r"call model\.train\(\) first"),
        (lambda: qat.Linear(3, 3), QuantizedTensorError, "Linear needs a qconfig"),
        (lambda: qat.Linear.from_float(nn.ReLU()), QuantizedTensorError, "from_float takes Linear, got ReLU"),
        (
            lambda: qat.Embedding(3, 3, qconfig=default_qat_qconfig),
            QuantizedTensorError,
            "take default_embedding_qat_qconfig",
        ),
    ],
)
def test_what_cannot_be_trained_is_said(change: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        change()


def test_a_batch_norm_without_statistics_is_refused() -> None:
    fused: Any = intrinsic.ConvBn2d(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False))
    fused.qconfig = default_qat_qconfig
    with pytest.raises(QuantizedTensorError, match="no running statistics"):
        intrinsic.qat.ConvBn2d.from_float(fused)
