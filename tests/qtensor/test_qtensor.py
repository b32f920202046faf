"""QTensor: the reference's functions and methods beside torch's own, files, copies, errors, and what compilers see."""

from __future__ import annotations

import copy
import io
import multiprocessing
import multiprocessing.reduction
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pt2e_quant import QuantizationError, dequantize, quantize_per_channel, quantize_per_tensor
from pt2e_quant import quantize_per_tensor_dynamic as quantize_dynamic
from pt2e_quant.nn import quantized
from pt2e_quant.qtensor import QTensor, dequantizing, from_torch, to_torch

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
Q = quantize_per_tensor(X, 0.05, 10, torch.quint8)
TYPES = (torch.quint8, torch.qint8, torch.qint32)

METHODS: dict[str, Callable[[Any], Any]] = {
    "view": lambda t: t.view(6, 4),
    "as_strided": lambda t: t.as_strided((2, 2), (1, 2)),
    "expand": lambda t: t.unsqueeze(0).expand(3, 4, 6),
    "flatten": lambda t: t.flatten(),
    "select": lambda t: t.select(0, 1),
    "index": lambda t: t[1:3, ::2],
    "mask": lambda t: t[t > 0],
    "clone": lambda t: t.clone(),
    "max": lambda t: t.max(),
    "min": lambda t: t.min(),
    "max of a dimension": lambda t: t.max(1),
    "mean": lambda t: t.mean(1),
    "sort": lambda t: t.sort(1),
    "topk": lambda t: t.topk(2, 1),
    "transpose": lambda t: t.t(),
    "permute": lambda t: t.permute(1, 0).contiguous(),
    "reshape": lambda t: t.reshape(-1, 2),
    "chunk": lambda t: t.chunk(2, 1),
    "cat": lambda t: torch.cat([t, t]),
    "relu": lambda t: t.relu(),
    "relu_": lambda t: t.clone().relu_(),
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "clamp": lambda t: t.clamp(-0.5, 0.5),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardsigmoid": F.hardsigmoid,
    "leaky_relu": lambda t: F.leaky_relu(t, 0.125),
    "threshold": lambda t: F.threshold(t, 0.2, 0.1),
    "max_pool2d, padded": lambda t: F.max_pool2d(t[None, None], 3, 2, 1, 1, True),
    "max_pool2d, dilated": lambda t: F.max_pool2d(t[None, None], 2, 1, 0, 2),
    "max_pool1d": lambda t: F.max_pool1d(t[None], 2),
    "max_pool2d": lambda t: F.max_pool2d(t[None, None], 2),
    "avg_pool2d": lambda t: F.avg_pool2d(t[None, None], 2),
    "adaptive_avg_pool2d": lambda t: F.adaptive_avg_pool2d(t[None], 2),
    "interpolate": lambda t: F.interpolate(t[None, None], scale_factor=2.0),
    "eq": lambda t: t.eq(0.1),
    "ne": lambda t: t.ne(t),
    "ge": lambda t: t.ge(0.1),
    "le": lambda t: t.le(t),
    "gt": lambda t: t.gt(0.1),
    "lt": lambda t: t.lt(0.1),
    "equal": lambda t: t.equal(t.clone()),
    "item": lambda t: t[0, 0].item(),
    "int_repr": lambda t: t.int_repr(),
    "dequantize": lambda t: t.dequantize(),
    "q_scale": lambda t: t.q_scale(),
    "q_zero_point": lambda t: t.q_zero_point(),
    "qscheme": lambda t: t.qscheme(),
    "dtype": lambda t: t.dtype,
    "is_quantized": lambda t: t.is_quantized,
    "resize_": lambda t: t.clone().resize_(2, 3),
    "copy_ of a float": lambda t: t.clone().copy_(X.flip(0)),
}


def as_plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [as_plain(one) for one in value]
    if isinstance(value, Tensor) and value.is_quantized:
        return (value.int_repr().tolist(), pytest.approx(value.q_scale()), value.q_zero_point())
    return value.tolist() if isinstance(value, Tensor) else value


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", METHODS)
def test_methods_do_what_torchs_do(name: str) -> None:
    assert as_plain(METHODS[name](Q)) == as_plain(METHODS[name](to_torch(Q)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", TYPES)
def test_quantize_per_tensor_is_torchs(dtype: torch.dtype) -> None:
    mine, their = (call(X, 0.037, 3, dtype) for call in (quantize_per_tensor, torch.quantize_per_tensor))
    assert torch.equal(mine.int_repr(), their.int_repr())
    assert torch.equal(mine.dequantize(), their.dequantize())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [*TYPES, "floats", "4 bits"])
def test_quantize_per_channel_is_torchs(dtype: Any) -> None:
    scales, zero_points = torch.rand(6) + 0.01, torch.randint(0, 10, (6,))
    floats = isinstance(dtype, str)
    x, axis = (X.t(), 0) if dtype == "4 bits" else (X, 1)
    kind = {"floats": torch.quint8, "4 bits": torch.quint4x2}.get(dtype, dtype)
    arguments = (x, scales, zero_points + 0.3 if floats else zero_points, axis, kind)
    mine, their = quantize_per_channel(*arguments), torch.quantize_per_channel(*arguments)
    assert torch.equal(mine.dequantize(), their.dequantize())
    assert mine.qscheme() == their.qscheme()
    for name in ("q_per_channel_scales", "q_per_channel_zero_points", "q_per_channel_axis"):
        assert as_plain(getattr(mine, name)()) == as_plain(getattr(their, name)())


def test_float_zero_points_and_int32_work_where_torch_dies() -> None:
    made = quantize_per_channel(X, torch.full((6,), 0.5), torch.full((6,), 0.25), 1, torch.qint32)
    assert torch.equal(made.int_repr(), torch.round(X * 2 + 0.25).int())


def test_a_list_of_tensors_and_dynamic_scales() -> None:
    made = quantize_per_tensor([X, X], torch.tensor([0.1, 0.2]), torch.tensor([0, 3]), torch.qint8)
    assert [one.q_scale() for one in made] == pytest.approx([0.1, 0.2])
    assert [torch.is_tensor(one) for one in dequantize(made)] == [True, True]
    own = quantize_dynamic(torch.tensor([-1.0, 1.55]), torch.quint8)
    assert (own.q_scale(), own.q_zero_point()) == (pytest.approx(0.01), 100)
    assert quantize_dynamic(X, torch.quint8, reduce_range=True).int_repr().max() <= 127


@given(st.integers(-128, 127), st.floats(2**-10, 2**10), st.integers(1, 40))
def test_values_are_half_a_step_from_their_codes(zero_point: int, scale: float, count: int) -> None:
    low, high = (-128 - zero_point) * scale, (127 - zero_point) * scale
    x = torch.linspace(low, high, count, dtype=torch.float64).float()
    made = quantize_per_tensor(x, scale, zero_point, torch.qint8)
    # 2^-16: float32 keeps 24 bits of x / scale, of which 8 count steps
    assert ((made.dequantize() - x).abs() <= scale * (0.5 + 2**-15)).all()


def test_scales_move_with_their_axis() -> None:
    made = quantize_per_channel(X, torch.rand(6) + 0.01, torch.zeros(6).long(), 1, torch.qint8)
    assert torch.equal(made.t().dequantize(), made.dequantize().t())
    assert made.t().q_per_channel_axis() == 0
    with pytest.raises(QuantizationError, match="dequantize"):
        made.view(-1)


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("again", [copy.deepcopy, copy.copy, lambda q: pickle.loads(pickle.dumps(q)), through_a_file])
def test_copies_and_files_are_equal(again: Callable[[Any], Any]) -> None:
    scales = (torch.rand(6) + 0.01, torch.rand(6))
    for value in (Q, quantize_per_channel(X, *scales, 1, torch.quint8)):
        assert again(value).equal(value)
    packed = quantize_per_channel(X[:, :5].contiguous(), torch.rand(4) + 0.1, torch.rand(4), 0, torch.quint4x2)
    assert again(packed).shape == (4, 5)
    assert again(packed).equal(packed)


def test_views_share_codes() -> None:
    made = Q.clone()
    made[0].copy_(torch.zeros(6))
    assert made.dequantize()[0].abs().max() == 0
    assert not made.equal(Q)


def _sum(queue: Any, value: Any) -> None:
    queue.put(int(value.int_repr().sum()))


def test_it_is_no_floating_point_tensor_and_becomes_one_when_asked() -> None:
    module = torch.nn.Module()
    module.register_buffer("weight", Q)
    assert module.half().weight.equal(Q)
    for real in (Q.float(), Q.to(torch.float32)):
        assert type(real) is Tensor
        assert torch.equal(real, Q.dequantize())
    assert Q.element_size() == 1
    assert Q.tolist() == Q.dequantize().tolist()


def test_memory_is_shared_with_other_processes() -> None:
    made = Q.clone().share_memory_()
    assert made.is_shared()
    assert pickle.loads(bytes(multiprocessing.reduction.ForkingPickler.dumps(made))).equal(Q)


LINEAR = quantized.Linear(6, 2)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    "function",
    [
        lambda x: quantize_per_tensor(x, 0.1, 3, torch.quint8).view(-1).relu().dequantize(),
        lambda x: LINEAR(quantize_per_tensor(x, 0.1, 3, torch.quint8)).dequantize(),
    ],
)
def test_functorch_sees_plain_integers(function: Callable[[Tensor], Tensor]) -> None:
    rows = torch.stack([function(row) for row in X])
    assert torch.equal(torch.func.vmap(function)(X), rows)
    assert torch.equal(torch.func.functionalize(torch.func.vmap(function))(X), rows)
    assert torch.func.grad(lambda x: (function(X) * x.sum()).sum())(X).shape == X.shape


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_batch_of_quantized_tensors_goes_through_vmap() -> None:
    assert torch.equal(torch.func.vmap(lambda q: q.relu().dequantize())(Q), Q.relu().dequantize())


@pytest.mark.slow
def test_another_process_gets_the_same_codes() -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_sum, args=(queue, Q))
    process.start()
    assert queue.get(timeout=120) == int(Q.int_repr().sum())
    process.join()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stored", [torch.uint8, torch.int8])
def test_max_pools_of_any_layout_pick_the_largest_codes(layout: torch.memory_format, stored: torch.dtype) -> None:
    codes = (torch.arange(2 * 40 * 9 * 7) * 37 % 256).reshape(2, 40, 9, 7).to(stored).contiguous(memory_format=layout)
    for window in ((3, 2, 1, 1, False), ((2, 3), (1, 2), 0, 2, False), (2, 2, 1, 1, True)):
        made = F.max_pool2d(QTensor(codes, 0.1, 3), *window)
        assert torch.equal(made.int_repr().float(), F.max_pool2d(codes.float(), *window))


def test_a_sum_is_told_which_module_brings_its_scale() -> None:
    with pytest.raises(QuantizationError, match=r"FloatFunctional\(\)\.add") as caught:
        Q + Q
    assert "test_qtensor.py:" in str(caught.value)
    assert "Q + Q" in str(caught.value)
    with pytest.raises(QuantizationError, match="DeQuantStub"):
        torch.exp(Q)
    with dequantizing():
        assert torch.equal(Q + Q, Q.dequantize() * 2)


def test_an_axis_moves_with_dimensions_of_one() -> None:
    rows = quantize_per_channel(torch.rand(3, 1, 2, 1), torch.ones(2), torch.zeros(2), 2, torch.qint8)
    assert [rows.squeeze().axis, rows.unsqueeze(0).axis, rows.squeeze(1).axis] == [1, 3, 1]
    assert rows.squeeze().dequantize().equal(rows.dequantize().squeeze())
    one = quantize_per_channel(torch.rand(1, 3), torch.ones(1), torch.zeros(1), 0, torch.qint8)
    with pytest.raises(QuantizationError):
        one.squeeze(0)


def test_four_bits_stay_where_two_of_them_share_a_byte() -> None:
    columns = quantize_per_channel(torch.rand(4, 5), torch.rand(5) + 0.1, torch.zeros(5), 1, torch.quint4x2)
    assert copy.deepcopy(columns).equal(columns)
    with pytest.raises(QuantizationError):
        columns.t()


def test_a_grid_sample_is_rounded_to_the_grid_of_its_input() -> None:
    places = torch.rand(2, 4, 3, 2) * 2 - 1
    images = quantize_per_tensor(torch.rand(2, 3, 5, 6), 1 / 128, 20, torch.quint8)
    made = F.grid_sample(images, places, align_corners=False)
    exact = F.grid_sample(images.dequantize(), places, align_corners=False)
    assert float((made.dequantize() - exact).abs().max()) <= 0.5001 / 128  # half a step, and rounding in float32


@pytest.mark.parametrize("shape", [(2,), (0, 1)])
def test_it_prints_as_torchs(shape: tuple[int, ...]) -> None:
    printed = repr(quantize_per_tensor(torch.ones(shape), 1.0, 2, torch.qint8))
    values = "[], " if 0 in shape else "[1., 1.], "
    scheme = "quantization_scheme=torch.per_tensor_affine, scale=1.0, zero_point=2)"
    assert printed == f"tensor({values}size={shape}, dtype=torch.qint8, {scheme}"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: QTensor(X, 1.0, 0),
        lambda: QTensor(Q.codes, 0.0, 0),
        lambda: QTensor(Q.codes, torch.ones(3), torch.zeros(3), 1),
        lambda: QTensor(Q.codes, 1.0, 0, dtype=torch.qint8),
        lambda: quantize_per_tensor(X, 0.1, 0, torch.float32),
        lambda: quantize_per_tensor(Q, 0.1, 0, torch.quint8),
        lambda: quantize_dynamic(Q, torch.quint8),
        lambda: quantize_per_tensor([X], torch.ones(2), torch.zeros(2), torch.qint8),
        lambda: quantize_per_channel(X, torch.ones(6), torch.zeros(6), 5, torch.qint8),
        lambda: quantize_dynamic(X, torch.qint32),
        lambda: Q.q_per_channel_scales(),
        lambda: Q.clone().copy_(quantize_per_tensor(X, 0.1, 0, torch.qint8)),
        lambda: Q.equal(X),
        lambda: X.clone().copy_(Q),
    ],
)
def test_what_does_not_fit_is_refused(wrong: Callable[[], Any]) -> None:
    with pytest.raises(QuantizationError):
        wrong()


@pytest.mark.filterwarnings("ignore")
def test_the_border_keeps_versions_and_other_values() -> None:
    state = torch.nn.BatchNorm1d(2).state_dict()
    state["q"], state["kind"] = Q, torch.qint8  # type: ignore[assignment]
    there = to_torch(state)
    assert there._metadata == state._metadata
    assert there["kind"] is torch.qint8
    assert type(there["q"]) is Tensor
    assert from_torch(there)["q"].equal(Q)


class Round(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return quantize_per_tensor(x, 0.05, 10, torch.quint8).view(-1).relu().dequantize() + 1


def test_export_sees_plain_integers() -> None:
    program = torch.export.export(Round(), (X,))
    names = {str(node.target) for node in program.graph.nodes}
    assert "quantized_decomposed.quantize_per_tensor.default" in names
    assert torch.allclose(program.module()(X), Round()(X))


class Codes(torch.nn.Module):
    def forward(self, codes: Tensor) -> Tensor:
        return QTensor(codes, 0.05, 10).relu().dequantize()


class Whole(torch.nn.Module):
    def forward(self, q: Tensor) -> Tensor:
        return q.relu().dequantize()


def test_an_exported_program_takes_codes_and_no_quantized_tensor() -> None:
    with pytest.raises(QuantizationError, match="takes the codes"):
        torch.export.export(Whole(), (Q,))
    made = torch.export.export(Codes(), (Q.int_repr(),)).module()
    assert torch.equal(made(Q.int_repr()), Q.relu().dequantize())


def test_compile_sees_plain_integers() -> None:
    wanted = Round()(X)
    assert torch.allclose(torch.compile(Round(), backend="aot_eager")(X), wanted)
    made = torch.compile(lambda q: q.view(-1).dequantize() * 2, backend="aot_eager", fullgraph=True)(Q)
    assert torch.equal(made, Q.dequantize().view(-1) * 2)


@pytest.mark.parametrize(
    ("quantize", "outside"),
    [
        (lambda: quantize_per_tensor(X, 0.05, 300, torch.quint8), "0 to 255, got 300"),
        (lambda: quantize_per_tensor(X, 0.05, torch.tensor(-129), torch.qint8), "-128 to 127, got -129"),
        (lambda: quantize_per_tensor([X, X], torch.ones(2), torch.tensor([3, -1]), torch.quint8), "0 to 255, got -1"),
        (lambda: quantize_per_channel(X, torch.ones(4), torch.tensor([0, 5, 128, 1]), 0, torch.qint8), "got 128"),
    ],
)
def test_a_zero_point_is_a_code(quantize, outside):
    with pytest.raises(QuantizationError, match=outside):
        quantize()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_integers_are_not_quantized(dtype):
    with pytest.raises(QuantizationError, match="floating point"):
        quantize_per_tensor(X.to(dtype), 0.05, 0, torch.quint8)
    with pytest.raises(QuantizationError, match="floating point"):
        quantize_per_channel(X.to(dtype), torch.ones(4), torch.zeros(4), 0, torch.quint8)
