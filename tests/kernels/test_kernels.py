"""Every kernel against the reference in exact integers, and that against float64; which one is chosen, and why."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pt2e_quant import QuantizationError, qparams, quantize_per_channel, quantize_per_tensor
from pt2e_quant.grid import Grid
from pt2e_quant.kernels import Geometry, Post, Product, Weight, add, explain, onednn, using
from pt2e_quant.kernels.choice import TABLE, choose
from pt2e_quant.kernels.recurrent import RECURRENT
from pt2e_quant.qtensor import QTensor
from pt2e_quant.sqnr import sqnr

RELU = Post("relu", torch.relu)
STORED = {torch.uint8: torch.quint8, torch.int8: torch.qint8}


def weight_of(shape: tuple[int, ...], axis: int, seed: int, bias: int | None, geometry: Any = None) -> Weight:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    scales = values.abs().amax([dim for dim in range(len(shape)) if dim != axis]).clamp(min=1e-3) / 127
    codes = quantize_per_channel(values, scales, torch.zeros(shape[axis]).long(), axis, torch.qint8)
    return Weight(codes, None if bias is None else torch.randn(bias, generator=generator), geometry)


def input_of(shape: tuple[int, ...], stored: torch.dtype, zero_point: int, seed: int) -> QTensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return quantize_per_tensor(values, 1 / 40, zero_point + (128 if stored is torch.uint8 else 0), STORED[stored])


def check(weight: Weight, x: QTensor, post: Post) -> None:
    """Each kernel that can compute it: codes within one step of the exact ones, those within one of float64."""
    real = weight.apply(
        x.dequantize().double(),
        weight.quantized.dequantize().double(),
        None if weight.bias is None else weight.bias.double(),
    )
    real = real if post.function is None else post.function(real)
    scale = max(float(real.abs().max()) / 100, 1e-4)
    with using("exact"):
        exact = Product.compute(weight, post, x, scale, 3)
    low, high = exact.limits
    wanted = (torch.round(real / scale) + 3).clamp(low, high)
    assert (exact.int_repr() - wanted).abs().max() <= 1
    for name, kernel in TABLE.items():
        if kernel.lacks(Product.of(weight, post, x, Grid(scale, 3, *exact.limits, exact.codes.dtype))) is None:
            with using(name):
                made = Product.compute(weight, post, x, scale, 3)
                values = Product.compute_real(weight, post, x)
            steps = (made.int_repr().int() - exact.int_repr().int()).abs().max()
            assert steps <= (0 if name in ("small", "carried") else 1), name
            torch.testing.assert_close(values.double(), real, rtol=1e-4, atol=1e-4 * float(real.abs().max()) + 1e-6)


INPUTS = st.tuples(st.sampled_from([torch.uint8, torch.int8]), st.integers(-100, 100), st.integers(0, 999))


@settings(max_examples=25)
@given(
    st.integers(1, 5), st.integers(1, 40), st.integers(1, 20), INPUTS, st.booleans(), st.sampled_from([Post(), RELU])
)
def test_linears_are_exact_to_one_step(rows: int, inner: int, outer: int, of: Any, bias: bool, post: Post) -> None:
    stored, zero_point, seed = of
    check(
        weight_of((outer, inner), 0, seed, outer if bias else None),
        input_of((rows, inner), stored, zero_point, seed),
        post,
    )


@settings(max_examples=25)
@given(
    st.integers(1, 3), st.integers(1, 2), st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), st.integers(0, 1),
    st.integers(1, 2), INPUTS, st.booleans(), st.sampled_from([Post(), RELU]),
)  # fmt: skip
def test_convolutions_are_exact_to_one_step(
    dims: int, groups: int, channels: int, kernel: int, stride: int, padding: int, dilation: int, of: Any,
    transposed: bool, post: Post,
) -> None:  # fmt: skip
    stored, zero_point, seed = of
    inputs, outputs = channels * groups, 3 * groups
    each = tuple((one,) * dims for one in (stride, padding, dilation))
    geometry = Geometry(*each, groups, transposed, (0,) * dims if transposed else ())
    sizes = (inputs, 3) if transposed else (outputs, channels)
    axis = 1 if transposed else 0
    weight = weight_of((*sizes, *(kernel,) * dims), axis, seed, outputs, geometry)
    check(weight, input_of((2, inputs, *(7,) * dims), stored, zero_point, seed), post)


@pytest.mark.parametrize(("size", "kernel", "padding", "dilation"), [(1, 2, 1, 2), (6, 1, 2, 1), (3, 2, 3, 1)])
def test_windows_that_see_padding_only_are_exact(size: int, kernel: int, padding: int, dilation: int) -> None:
    geometry = Geometry((1, 1), (1, padding), (1, dilation))
    weight = weight_of((2, 3, 3, kernel), 0, 0, 2, geometry)
    check(weight, input_of((2, 3, 8, size), torch.uint8, 85, 0), Post())


def test_a_weight_with_zero_points_is_exact() -> None:
    codes = quantize_per_channel(torch.randn(4, 6), torch.full((4,), 0.02), torch.tensor([1, -2, 3, 0]), 0, torch.qint8)
    check(Weight(codes, torch.randn(4)), input_of((3, 6), torch.uint8, 5, 0), Post())


def test_sums_beyond_float32_are_exact() -> None:
    codes = quantize_per_tensor(torch.ones(2, 4096), 1 / 127, 0, torch.qint8)
    x = quantize_per_tensor(torch.full((1, 4096), 255.0), 1.0, 0, torch.quint8)
    x.codes[0, 0] = 254  # 4096 * 255 * 127 - 127 = 132,648,833: float32 would count in steps of 8
    with using("carried"):
        assert Product.compute_real(Weight(codes), Post(), x).tolist() == [[132648833 / 127] * 2]


@pytest.mark.parametrize("stored", [torch.uint8, torch.int8])
def test_the_kernel_for_gpus_computes_the_same_codes(stored: torch.dtype) -> None:
    weight, x = weight_of((16, 64), 0, 0, 16), input_of((32, 64), stored, 7, 1)
    with using("int_mm"):  # torch._int_mm has a kernel for CPUs, too
        made, values = Product.compute(weight, RELU, x, 0.1, 3), Product.compute_real(weight, RELU, x)
    with using("exact"):
        assert torch.equal(made.int_repr(), Product.compute(weight, RELU, x, 0.1, 3).int_repr())
        torch.testing.assert_close(values, Product.compute_real(weight, RELU, x))


def test_an_input_of_another_size_is_refused() -> None:
    linear, conv = weight_of((4, 6), 0, 0, 4), weight_of((4, 3, 1, 1), 0, 0, 4, Geometry((1, 1), (0, 0), (1, 1), 2))
    with pytest.raises(QuantizationError, match=r"6 features in the last dimension, got an input of shape \(2, 7\)"):
        Product.compute(linear, Post(), input_of((2, 7), torch.uint8, 0, 0), 0.1, 0)
    with pytest.raises(QuantizationError, match="6 features"):
        Product.compute_dynamic(linear, Post(), torch.ones(2, 5))
    with pytest.raises(QuantizationError, match="6 channels in the second"):
        Product.compute(conv, Post(), input_of((1, 3, 2, 2), torch.uint8, 0, 0), 0.1, 0)


def test_few_rows_and_many_take_different_kernels() -> None:
    small = Product.of(weight_of((64, 64), 0, 0, 64), Post(), input_of((1, 64), torch.uint8, 0, 0), None)
    assert choose(small).name == "small"
    large = Product.of(weight_of((64, 256), 0, 0, 64), Post(), input_of((32, 256), torch.uint8, 0, 0), None)
    assert choose(large).name == ("onednn" if onednn._absent() is None else "carried")


def test_a_transposed_convolution_takes_the_carried_kernel_and_says_why() -> None:
    geometry = Geometry((2, 2), (0, 0), (1, 1), 1, True, (0, 0))
    product = Product.of(
        weight_of((4, 3, 2, 2), 1, 0, 3, geometry), Post(), input_of((1, 4, 5, 5), torch.uint8, 0, 0), None
    )
    text = explain(product)
    assert "not here: a transposed convolution" in text
    assert text.endswith("chosen: carried")


def test_a_named_kernel_that_cannot_compute_a_product_says_why() -> None:
    weight = weight_of((4, 6), 0, 0, 4)
    x = quantize_per_tensor(torch.randn(2, 6), 0.1, 0, torch.qint32)
    for name, reason in (("onednn", "codes of 32 bits"), ("packed", "real numbers, not codes"), ("int_mm", "8-bit")):
        with pytest.raises(QuantizationError, match=f"using.'{name}'.*{reason}"), using(name):
            Product.compute(weight, Post(), x, 0.1, 0)


@pytest.mark.parametrize("shape", [(64,), (1, 64), (5, 7, 64)])
def test_all_kernels_of_dynamic_linears_agree(shape: tuple[int, ...]) -> None:
    weight, x = weight_of((48, 64), 0, 0, 48), torch.randn(shape)
    with using("exact"):
        exact = Product.compute_dynamic(weight, RELU, x)
    for name in (None, "packed", "onednn", "small", "carried"):
        with using(name) if name else nullcontext():
            made = Product.compute_dynamic(weight, RELU, x)
            assert float(sqnr(exact, made)) > 50  # 8-bit codes of x, of which a few fall on the other side of a half
            with pytest.raises(QuantizationError, match="no NaN and no infinity"):
                Product.compute_dynamic(weight, RELU, x / 0)


@pytest.mark.parametrize("stored", [torch.uint8, torch.int8])
@pytest.mark.parametrize("zero_point", [0, 3, -5, 100])
def test_rounding_in_the_bits_of_float32_is_rounding(stored: torch.dtype, zero_point: int) -> None:
    held = torch.iinfo(stored)
    steps = torch.cat([torch.arange(-600, 600) / 4, torch.tensor([1e9, -1e9, 3e38, float("inf"), -float("inf")])])
    wanted = (torch.round(steps) + zero_point).clamp(held.min, held.max).to(torch.int16).to(stored)
    assert torch.equal(qparams.rounded(steps, zero_point, held.min, held.max, stored), wanted)


def test_the_table_gives_a_reason_for_each_kernel() -> None:
    assert explain().count("\n") + 1 == len(TABLE) + len(RECURRENT)
    with pytest.raises(QuantizationError, match="Did you mean 'exact'"), using("exakt"):
        pass


def test_a_weight_forgets_what_kernels_derived_when_it_is_copied() -> None:
    weight = weight_of((4, 6), 0, 0, 4)
    Product.compute(weight, Post(), input_of((2, 6), torch.uint8, 0, 0), 0.1, 0)
    assert weight.derived
    assert not weight.__getstate__()["derived"]


def test_a_weight_with_scales_along_its_inputs_is_refused() -> None:
    codes = quantize_per_channel(torch.randn(4, 6), torch.ones(6), torch.zeros(6).long(), 1, torch.qint8)
    with pytest.raises(QuantizationError, match="dimension 0"):
        Weight(codes)


@settings(deadline=None)
@given(
    st.sampled_from([(16,), (3, 32), (1, 8, 6, 5), (2, 16, 3, 3), (5, 7)]), st.booleans(), st.booleans(),
    st.integers(0, 255), st.floats(0.01, 0.2), st.integers(0, 2**16),
)  # fmt: skip
def test_sums_are_within_one_step_of_exact(
    shape: tuple[int, ...], relu: bool, last: bool, zero_point: int, scale: float, seed: int
) -> None:
    """All codes from 0 to 255 come in, in both orders of memory, and in sizes that oneDNN does not take."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (2, *shape), dtype=torch.uint8, generator=generator)
    ordered = [one.contiguous(memory_format=torch.channels_last) if last and one.dim() == 4 else one for one in codes]
    a, b = QTensor(ordered[0], 1 / 40, 128), QTensor(ordered[1], 1 / 50, 90)
    real = a.dequantize().double() + b.dequantize().double()
    wanted = (torch.round((real.relu() if relu else real) / scale) + zero_point).clamp(0, 255)
    assert (add(a, b, scale, zero_point, relu=relu).int_repr() - wanted).abs().max() <= 1
