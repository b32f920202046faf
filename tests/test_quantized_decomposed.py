"""Our registration of the q/dq ops against torch.ao's: the same schemas, the same bits.

Most tests register ours under another namespace and compare in one process. Those on the import itself start a fresh
interpreter in which torch.ao has no such ops: it runs this file as a script.
"""

from __future__ import annotations

import gc
import importlib.abc
import itertools
import math
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.export import Dim
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).parents[1]
OURS, THEIRS = "pt2e_quant_test", "quantized_decomposed"
PROVIDER = "torch.ao.quantization.fx._decomposed"
Case = tuple[str, tuple[Any, ...], dict[str, Any]]


def overload(namespace: str, name: str) -> Any:
    packet, _, kind = name.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), kind or "default")


def schemas(namespace: str) -> dict[str, str]:
    found = (s for s in torch._C._jit_get_all_schemas() if s.name.startswith(f"{namespace}::"))
    return {f"{s.name}.{s.overload_name}".partition("::")[2]: str(s).partition("::")[2] for s in found}


# --- the calls that both must answer alike ----------------------------------------------------------------------------

RANGES = {
    torch.int8: (-128, 127),
    torch.uint8: (0, 255),
    torch.uint16: (0, 65535),
    torch.int16: (-32768, 32767),
    torch.int32: (-(2**31), 2**31 - 1),
    torch.float8_e4m3fn: (-448, 448),
}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def codes(*shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
    low, high = RANGES[dtype]
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(1)).to(dtype)


# Halves are rounded to even, before or after the (odd) zero point is added: the two differ, and so do the ops.
TIES, ONES = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5]]), (torch.ones(1, 1), torch.ones(1, 1, dtype=torch.int64))


def per_tensor() -> Iterator[Case]:
    for dtype, (low, high) in RANGES.items():
        zero_point = (low + high) // 2 + 7
        scale = 0.0371 if high < 1000 else 3e-4
        for real in FLOATS:
            x = random(4, 9, dtype=real)
            yield "quantize_per_tensor", (x, scale, zero_point, low, high, dtype), {}
            if dtype.is_floating_point:
                continue
            tensors = torch.tensor([scale], dtype=torch.float64), torch.tensor([zero_point])
            yield "quantize_per_tensor.tensor", (x, *tensors, low, high, dtype), {}
            bounds = torch.tensor(low), torch.tensor(high)
            yield "quantize_per_tensor.tensor2", (x, *tensors, *bounds, dtype), {}
        if dtype in (torch.float8_e4m3fn, torch.uint16):
            continue
        for out in (None, *FLOATS):
            q = codes(4, 9, dtype=dtype)
            kwargs = {} if out is None else {"out_dtype": out}
            yield "dequantize_per_tensor", (q, scale, zero_point, low, high, dtype), kwargs
            tensors = torch.tensor(scale), torch.tensor([zero_point], dtype=torch.int32)
            yield "dequantize_per_tensor.tensor", (q, *tensors, low, high, dtype), kwargs
            yield "dequantize_per_tensor.tensor2", (q, *tensors, torch.tensor(low), torch.tensor(high), dtype), kwargs
    yield "quantize_per_tensor", (random(4, 9).t(), 0.1, 3, -127, 127, torch.int8), {}
    yield "quantize_per_tensor", (torch.tensor(2.5), 1.0, 0, -128, 127, torch.int8), {}
    yield "quantize_per_tensor", (TIES[0], 1.0, 1, -128, 127, torch.int8), {}


def choices() -> Iterator[Case]:
    for real in FLOATS:
        x = random(3, 8, dtype=real)
        for tensor in (x, x.abs() + 1, -x.abs() - 1, x * 0, x * 1e-6, x[0, 0], x * 1e4):
            for dtype in (torch.int8, torch.uint8):
                for name in ("choose_qparams.tensor", "choose_qparams_symmetric.tensor"):
                    yield name, (tensor, *RANGES[dtype], 1e-5, dtype), {}
            yield "choose_qparams.tensor", (tensor, -8, 7, torch.finfo(torch.float32).eps, torch.int8), {}


def per_channel() -> Iterator[Case]:
    shape = (3, 4, 5, 2)
    layouts = (lambda t: t, lambda t: t.to(memory_format=torch.channels_last), lambda t: t.transpose(1, 2))
    for axis, layout in itertools.product((0, 1, 2, 3, -1), layouts):
        q = layout(codes(*shape))
        channels = q.shape[axis]
        scales = random(channels, seed=2).abs() / 50 + 1e-3
        for zero_points in (codes(channels).to(torch.int64), codes(channels).to(torch.int32)):
            for real in FLOATS:
                x = layout(random(*shape, dtype=real))
                yield "quantize_per_channel", (x, scales, zero_points, axis, -128, 127, torch.int8), {}
                arguments = (q, scales, zero_points, axis, -128, 127, torch.int8)
                yield "dequantize_per_channel", arguments, {"out_dtype": real}
        yield "quantize_per_channel", (x, scales.double(), zero_points, axis, -8, 7, torch.int8), {}
        yield "dequantize_per_channel", (q, scales.double(), zero_points, axis, -128, 127, torch.int8), {}
        yield "dequantize_per_channel", (q, scales, None, axis, -127, 127, torch.int8), {}
        if axis >= 0:
            arguments = (layout(random(*shape)), scales, codes(channels).to(torch.int32), axis, -128, 127)
            yield "fake_quant_per_channel", arguments, {}
    yield "quantize_per_channel", (TIES.repeat(2, 1), torch.ones(6), torch.ones(6), 1, -128, 127, torch.int8), {}
    wide = codes(4, 6, dtype=torch.int32)
    scales = random(4, seed=4).abs() / 1e7
    yield "dequantize_per_channel", (wide, scales, None, 0, *RANGES[torch.int32], torch.int32), {}


def per_token() -> Iterator[Case]:
    names = ("choose_qparams_per_token", "choose_qparams_per_token_asymmetric")
    for name, real, shape in itertools.product(names, FLOATS, ((7,), (4, 7), (2, 3, 7))):
        x = random(*shape, dtype=real)
        for tensor in (x, x.abs() + 1, x * 0):
            yield name, (tensor, torch.int8), {}
        qparams = overload(THEIRS, name)(x, torch.int8)
        yield "quantize_per_token", (x, *qparams, -128, 127, torch.int8), {}
        q = codes(*shape)
        for out in FLOATS:
            yield "dequantize_per_token", (q, *qparams, -128, 127, torch.int8, out), {}
    yield "quantize_per_token", (TIES, *ONES, -128, 127, torch.int8), {}
    yield "_choose_qparams_per_token_asymmetric_impl", (random(4, 7), torch.int8), {}


def per_group() -> Iterator[Case]:
    yield "quantize_per_channel_group", (TIES, *ONES, -128, 127, torch.int8, 6), {}
    for real, size in itertools.product(FLOATS, (4, 8, 32)):
        x, q = random(6, 8, dtype=real), codes(6, 8)
        shape = (6, max(8 // size, 1))
        scales, zero_points = random(*shape, seed=3).abs() / 20 + 1e-3, codes(*shape).to(torch.int32)
        yield "quantize_per_channel_group", (x, scales, zero_points, -8, 7, torch.int8, size), {}
        yield "quantize_per_channel_group", (x, scales, zero_points.float(), -128, 127, torch.int8, size), {}
        yield "dequantize_per_channel_group", (q, scales, zero_points, -128, 127, torch.int8, size, real), {}
        yield "dequantize_per_channel_group", (q, scales, None, -8, 7, torch.int8, size, real), {}


def casts() -> Iterator[Case]:
    for source, target in itertools.product(FLOATS, FLOATS):
        yield "convert_element_type.no_fuse", (random(3, 4, dtype=source), target), {}


def cases() -> list[Case]:
    return [*per_tensor(), *choices(), *per_channel(), *per_token(), *per_group(), *casts()]


REPLACED = {
    "choose_qparams.tensor": "choose_qparams_tensor",
    "choose_qparams_symmetric.tensor": "choose_qparams_symmetric_tensor",
}
"""Ops whose kernel ours replaces, for empty tensors; torch.ao's function is what it is held against."""


def answer(namespace: str, case: Case) -> list[Tensor]:
    name, args, kwargs = case
    call = overload(namespace, name)
    if namespace == THEIRS and name in REPLACED and PROVIDER in sys.modules and not args[0].is_meta:
        call = getattr(sys.modules[PROVIDER], REPLACED[name])
    return tree_leaves(call(*args, **kwargs))


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def form(tensors: list[Tensor]) -> list[tuple[Any, ...]]:
    return [(t.dtype, tuple(t.shape), t.stride()) for t in tensors]


def assert_same(ours: list[Tensor], theirs: list[Tensor], case: Case) -> None:
    assert form(ours) == form(theirs), case
    assert [bits(t) for t in ours] == [bits(t) for t in theirs], case


def on_meta(case: Case) -> Case:
    name, args, kwargs = case
    return name, tree_map(lambda a: a.to("meta") if isinstance(a, Tensor) else a, args), kwargs


# --- the script that a fresh interpreter runs -------------------------------------------------------------------------


class Blocked(importlib.abc.MetaPathFinder):
    """A torch without torch.ao.quantization.fx."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.startswith("torch.ao.quantization.fx"):
            raise ModuleNotFoundError(f"no module named {name!r}", name=name)
        return None


class Announcing(importlib.abc.MetaPathFinder):
    """A torch that announces the end of torch.ao.quantization.fx to everybody who imports it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.startswith("torch.ao.quantization.fx"):
            warnings.warn(f"{name} will be removed", DeprecationWarning, stacklevel=2)
        return None


class QuantizeRows(torch.nn.Module):
    """Quantizes at run time and with fixed qparams, per tensor and per token."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qd = torch.ops.quantized_decomposed
        scale, zero_point = qd.choose_qparams.tensor(x, -128, 127, 1e-5, torch.int8)
        q = qd.quantize_per_tensor.tensor(x, scale, zero_point, -128, 127, torch.int8)
        fixed = qd.quantize_per_tensor(x, 0.05, 3, -128, 127, torch.int8)
        scales, zero_points = qd.choose_qparams_per_token_asymmetric(x, torch.int8)
        rows = qd.quantize_per_token(x, scales, zero_points, -128, 127, torch.int8)
        return (
            qd.dequantize_per_tensor.tensor(q, scale, zero_point, -128, 127, torch.int8),
            qd.dequantize_per_tensor(fixed, 0.05, 3, -128, 127, torch.int8, out_dtype=torch.float16),
            qd.dequantize_per_token(rows, scales, zero_points, -128, 127, torch.int8, torch.float32),
        )


def exported() -> tuple[str, list[Tensor]]:
    """The code of QuantizeRows exported with a dynamic batch, and what it computes on another batch."""
    program = torch.export.export(QuantizeRows(), (random(4, 8),), dynamic_shapes=({0: Dim("batch", min=2)},))
    return str(program.graph_module.code), list(program.module()(random(7, 8)))


def observations() -> dict[str, Any]:
    return {
        "schemas": schemas(THEIRS),
        "answers": [answer(THEIRS, case) for case in cases()],
        "meta": [form(answer(THEIRS, on_meta(case))) for case in cases()],
        "exported": exported(),
    }


def define_one_op_first() -> torch.library.Library:
    """Somebody else got there before: an own choose_qparams.tensor, which always answers 0.5 and 7."""
    library = torch.library.Library(THEIRS, "FRAGMENT")
    library.define(
        "choose_qparams.tensor(Tensor input, int quant_min, int quant_max, float eps, ScalarType dtype)"
        " -> (Tensor, Tensor)"
    )
    library.impl("choose_qparams.tensor", lambda *_: (torch.tensor([0.5]), torch.tensor([7])), "CPU")
    return library


def main(scenario: str, destination: str) -> None:
    sys.path.insert(0, str(ROOT))
    result: dict[str, Any] = {}
    if scenario == "blocked":
        sys.meta_path.insert(0, Blocked())
    elif scenario == "announced":
        sys.meta_path.insert(0, Announcing())
    elif scenario == "taken":
        keep = define_one_op_first()  # noqa: F841
    from pt2e_quant import _quantized_decomposed, ops

    gc.collect()  # nothing of what is registered hangs on an object that dies
    before = schemas(THEIRS)
    ops.register_quantized_decomposed()
    result["provider imported"] = PROVIDER in sys.modules
    result["registered twice"] = schemas(THEIRS) != before
    result["ours"] = len(_quantized_decomposed._libraries)
    result["schemas"] = before
    if scenario == "announced":
        provider: Any = sys.modules[PROVIDER]
        result["defined"] = {name.partition("::")[2] for name in provider.quantized_decomposed_lib._op_defs}
    if scenario == "blocked":
        result.update(observations())
    if scenario == "taken":
        result["first"] = answer(THEIRS, ("choose_qparams.tensor", (random(3), -128, 127, 1e-5, torch.int8), {}))
        result["cast"] = answer(THEIRS, ("convert_element_type.no_fuse", (random(3), torch.float16), {}))
    torch.save(result, destination)


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.exit()


from pt2e_quant import _quantized_decomposed as fallback  # noqa: E402  the script above imports it in its own time
from pt2e_quant.errors import SpecError  # noqa: E402
from pt2e_quant.ops import register_quantized_decomposed  # noqa: E402

NAMES = {name if "." in name else f"{name}." for name in fallback.OPS}  # of a test process, ExecuTorch may add more


def fresh(scenario: str, tmp_path: Path) -> dict[str, Any]:
    destination = tmp_path / "result.pt"
    command = [sys.executable, "-W", "error", __file__, scenario, str(destination)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = torch.load(destination, weights_only=False)
    return found


@pytest.fixture(scope="module", autouse=True)
def _ours_beside_theirs() -> None:
    register_quantized_decomposed()
    fallback.register(OURS)


# --- registration -----------------------------------------------------------------------------------------------------


def test_without_torch_ao_our_ops_are_the_same_in_schema_bits_meta_and_export(tmp_path):
    found = fresh("blocked", tmp_path)
    assert not found["provider imported"]
    assert not found["registered twice"]
    assert found["ours"] == 1
    assert found["schemas"] == {name: text for name, text in schemas(THEIRS).items() if name in NAMES}
    for case, ours in zip(cases(), found["answers"], strict=True):
        assert_same(ours, answer(THEIRS, case), case)
    for case, ours in zip(cases(), found["meta"], strict=True):
        if case[0] != "choose_qparams_per_token":  # see the test of that name below
            assert ours == form(answer(THEIRS, on_meta(case))), case
    code, outputs = exported()
    assert found["exported"][0] == code
    assert_same(found["exported"][1], outputs, ("exported", (), {}))


def test_ops_of_somebody_else_stay_theirs_and_the_others_are_added(tmp_path):
    found = fresh("taken", tmp_path)
    assert not found["registered twice"]
    assert found["ours"] == 1
    assert set(found["schemas"]) == NAMES
    assert [t.item() for t in found["first"]] == [0.5, 7]
    assert found["cast"][0].dtype is torch.float16


def test_importing_is_silent_and_uses_torch_ao_where_it_is_there(tmp_path):
    found = fresh("announced", tmp_path)
    assert found["provider imported"]
    assert not found["registered twice"]
    assert found["ours"] == 0
    assert found["defined"] == set(fallback.OPS)  # torch.ao has no op that we lack


def test_the_schemas_are_those_of_torch_ao():
    assert set(schemas(OURS)) == NAMES
    assert schemas(OURS) == {name: text for name, text in schemas(THEIRS).items() if name in NAMES}


def test_only_what_is_missing_is_registered_and_only_once():
    library = torch.library.Library("pt2e_quant_test_partial", "FRAGMENT")
    library.define("quantize_per_tensor.out(Tensor input, *, Tensor(a!) out) -> Tensor(a!)")
    library.define("quantize_per_token(Tensor input) -> Tensor")
    expected = tuple(name for name in fallback.OPS if name != "quantize_per_token")
    assert fallback.missing("pt2e_quant_test_partial") == expected
    assert fallback.register("pt2e_quant_test_partial") == expected
    assert fallback.register("pt2e_quant_test_partial") == ()
    assert len(torch.ops.pt2e_quant_test_partial.quantize_per_token.default._schema.arguments) == 1


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [per_tensor, choices, per_channel, per_token, per_group, casts])
def test_results_equal_those_of_torch_ao_bit_by_bit(group):
    for case in group():
        assert_same(answer(OURS, case), answer(THEIRS, case), case)


def test_every_op_is_among_the_cases():
    assert {name for name, _, _ in cases()} == set(fallback.OPS)


@pytest.mark.parametrize("group", [per_tensor, choices, per_channel, per_token, per_group, casts])
def test_meta_tensors_come_out_as_real_tensors_do(group):
    for case in group():
        assert form(answer(OURS, on_meta(case))) == form(answer(OURS, case)), case


def test_meta_tensors_come_out_as_those_of_torch_ao_but_for_choose_qparams_per_token():
    """There torch.ao says float64 and int64, while the op returns the (float) type of its input for both."""
    for case in cases():
        ours, theirs = (form(answer(namespace, on_meta(case))) for namespace in (OURS, THEIRS))
        assert (ours == theirs) == (case[0] != "choose_qparams_per_token"), case


finite = st.floats(-(2.0**100), 2.0**100, width=32)


@given(
    values=st.lists(finite, min_size=1, max_size=20),
    scale=st.floats(2**-60, 2**60, width=32),
    zero_point=st.integers(-128, 127),
    bounds=st.lists(st.integers(-128, 127), min_size=2, max_size=2, unique=True).map(sorted),
)
def test_any_tensor_is_quantized_to_the_same_codes(values, scale, zero_point, bounds):
    x = torch.tensor(values)
    case = "quantize_per_tensor", (x, scale, zero_point, *bounds, torch.int8), {}
    assert_same(answer(OURS, case), answer(THEIRS, case), case)
    q = answer(THEIRS, case)[0]
    back = "dequantize_per_tensor", (q, scale, zero_point, *bounds, torch.int8), {}
    assert_same(answer(OURS, back), answer(THEIRS, back), back)


@given(
    values=st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1, max_size=20),
    eps=st.sampled_from([1e-5, 1e-12]),
)
def test_any_tensor_gets_the_same_qparams(values, eps):
    x = torch.tensor(values)
    for name in ("choose_qparams.tensor", "choose_qparams_symmetric.tensor"):
        case = name, (x, -128, 127, eps, torch.int8), {}
        assert_same(answer(OURS, case), answer(THEIRS, case), case)
    token = "choose_qparams_per_token_asymmetric", (x, torch.int8), {}
    assert_same(answer(OURS, token), answer(THEIRS, token), token)


def test_the_gradient_of_fake_quant_stops_outside_of_the_range():
    gradients = []
    for namespace in (OURS, THEIRS):
        x = random(4, 6).requires_grad_()
        out = overload(namespace, "fake_quant_per_channel")(x, torch.full((4,), 0.03), torch.zeros(4), 0, -64, 63)
        (out * torch.arange(24.0).view(4, 6)).sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    assert torch.equal(*gradients)
    inside = (random(4, 6) / 0.03).round().clamp(-64, 63) == (random(4, 6) / 0.03).round()
    assert torch.equal(gradients[0], torch.arange(24.0).view(4, 6) * inside)


def test_fake_quant_runs_without_autograd():
    with torch.inference_mode():
        out = overload(OURS, "fake_quant_per_channel")(random(4, 6), torch.ones(4), torch.zeros(4), 0, -2, 2)
    assert torch.equal(out, random(4, 6).round().clamp(-2, 2))


@pytest.mark.parametrize("zero_point", [100, -100])
def test_a_narrow_zero_point_does_not_wrap_around(zero_point):
    """-100 - 100 does not fit int8; torch.ao subtracts in int8 here and is off by 256 steps."""
    q, zero_points = torch.tensor([[-zero_point]], dtype=torch.int8), torch.tensor([zero_point], dtype=torch.int8)
    arguments = (q, torch.ones(1), zero_points, 0, -128, 127, torch.int8)
    assert answer(OURS, ("dequantize_per_channel", arguments, {}))[0].item() == -2 * zero_point
    assert answer(THEIRS, ("dequantize_per_channel", arguments, {}))[0].item() != -2 * zero_point


# --- export -----------------------------------------------------------------------------------------------------------


class Calls(torch.nn.Module):
    def __init__(self, namespace: str, name: str, rest: tuple[Any, ...]) -> None:
        super().__init__()
        self.op, self.rest = overload(namespace, name), rest

    def forward(self, x: Tensor) -> Any:
        return self.op(x, *self.rest)


CHANNELS = torch.rand(8, generator=torch.Generator().manual_seed(0)) + 0.1, torch.zeros(8, dtype=torch.int64)
INT8 = (-128, 127, torch.int8)
DYNAMIC = {
    "quantize_per_tensor": (0.1, 3, *INT8),
    "quantize_per_tensor.tensor": (torch.tensor([0.1]), torch.tensor([3]), *INT8),
    "quantize_per_tensor.tensor2": (
        *(torch.tensor([0.1]), torch.tensor([3])),
        *(torch.tensor(-128), torch.tensor(127), torch.int8),
    ),
    "choose_qparams.tensor": (-128, 127, 1e-5, torch.int8),
    "choose_qparams_symmetric.tensor": (-128, 127, 1e-5, torch.int8),
    "quantize_per_channel": (*CHANNELS, 1, *INT8),
    "fake_quant_per_channel": (*CHANNELS, 1, -128, 127),
    "choose_qparams_per_token": (torch.int8,),
    "choose_qparams_per_token_asymmetric": (torch.int8,),
    "convert_element_type.no_fuse": (torch.float16,),
    "dequantize_per_tensor": (0.1, 3, *INT8),
    "dequantize_per_tensor.tensor": (torch.tensor([0.1]), torch.tensor([3]), *INT8),
    "dequantize_per_channel": (*CHANNELS, 1, *INT8),
}


@pytest.mark.parametrize("name", DYNAMIC)
def test_an_op_is_exported_whole_with_a_symbolic_batch_and_runs_at_another_size(name):
    def of(size: int) -> Tensor:
        return codes(size, 8) if name.startswith("dequantize") else random(size, 8)

    results = []
    for namespace in (OURS, THEIRS):
        module = Calls(namespace, name, DYNAMIC[name])
        program = torch.export.export(module, (of(4),), dynamic_shapes=({0: Dim("batch", min=2)},))
        assert overload(namespace, name) in {node.target for node in program.graph.nodes}
        results.append(tree_leaves(program.module()(of(11))))
    assert_same(*results, (name, (), {}))


# --- errors -----------------------------------------------------------------------------------------------------------

X, Q, ONE, ZERO = random(4, 6), codes(4, 6), torch.ones(1), torch.zeros(1, dtype=torch.int64)
BAD: list[tuple[str, tuple[Any, ...], str]] = [
    ("quantize_per_tensor", (X.double(), 0.1, 0, *INT8), "got torch.float64; cast"),
    ("quantize_per_tensor", (X, 0.1, 0, -129, 127, torch.int8), r"\[-129, 127\] is not a range of torch.int8"),
    ("quantize_per_tensor", (X, 0.1, 0, 0, 256, torch.uint8), r"holds \[0, 255\]"),
    ("quantize_per_tensor", (X, 0.1, 0, 0, 1, torch.int64), "torch.int64 cannot store quantized values; use one of"),
    ("quantize_per_tensor.tensor", (X, torch.ones(2), ZERO, *INT8), "hold one element each, got 2 and 1"),
    ("quantize_per_tensor.tensor", (X, ONE, ZERO, -129, 127, torch.int8), "is not a range"),
    ("quantize_per_tensor.tensor2", (X, ONE, ZERO, ZERO - 129, ZERO, torch.int8), "is not a range"),
    ("dequantize_per_tensor", (Q, 0.1, 0, 0, 255, torch.uint8), "told torch.uint8, but the tensor holds torch.int8"),
    ("dequantize_per_tensor", (Q.long(), 0.1, 0, 0, 255, torch.int64), "cannot store"),
    ("dequantize_per_tensor.tensor", (Q, ONE, torch.zeros(3), *INT8), "got 1 and 3"),
    ("quantize_per_channel", (X, torch.ones(4), torch.zeros(4), 2, *INT8), "axis 2 does not exist"),
    ("dequantize_per_channel", (Q, torch.ones(4), None, -3, *INT8), "axis -3 does not exist in a tensor of 2"),
    ("fake_quant_per_channel", (X.half(), torch.ones(4), torch.zeros(4), 0, -8, 7), "takes float32, got torch.float16"),
    ("choose_qparams.tensor", (X.double(), -128, 127, 1e-5, torch.int8), "got torch.float64"),
    ("choose_qparams.tensor", (X, 1, 127, 1e-5, torch.int8), r"\[1, 127\] must hold 0"),
    ("choose_qparams_symmetric.tensor", (X, 0, 0, 1e-5, torch.int8), "at least one more value"),
    ("choose_qparams_per_token", (X, torch.uint8), "knows torch.int8 only, got torch.uint8"),
    ("quantize_per_token", (X, torch.ones(3, 1), torch.zeros(3, 1), *INT8), "holds 4 tokens, got 3 scales and 3 zero"),
    ("dequantize_per_token", (Q, torch.ones(4, 1), torch.zeros(3, 1), *INT8, torch.float32), "4 scales and 3 zero"),
    ("quantize_per_channel_group", (X, torch.ones(4, 2), torch.zeros(4, 2), *INT8, 4), "rows of 6 do not split"),
    ("quantize_per_channel_group", (X[0], torch.ones(1), torch.zeros(1), *INT8, 3), "need a matrix"),
    ("dequantize_per_channel_group", (Q, torch.ones(4, 6), None, *INT8, 1, torch.float32), "group_size > 1"),
    ("quantize_per_channel_group", (X * math.nan, torch.ones(4, 2), torch.zeros(4, 2), *INT8, 3), "holds NaN"),
]


@pytest.mark.parametrize(("name", "args", "message"), BAD)
def test_arguments_that_make_no_sense_are_refused_with_the_reason(name, args, message):
    with pytest.raises(SpecError, match=message):
        answer(OURS, (name, args, {}))


@pytest.mark.parametrize(
    ("name", "args", "message"), [bad for bad in BAD if bad[2] != "holds NaN" and "tensor2" not in bad[0]]
)
def test_they_are_refused_on_meta_tensors_too_while_exporting(name, args, message):
    with pytest.raises(SpecError, match=message):
        answer(OURS, on_meta((name, args, {})))


def test_a_row_narrower_than_its_group_is_one_group():
    q = answer(OURS, ("quantize_per_channel_group", (X, torch.ones(4, 1), torch.zeros(4, 1), *INT8, 128), {}))[0]
    assert torch.equal(q, X.round().to(torch.int8))


# --- tensors without values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "zero_point"), [("choose_qparams.tensor", -128), ("choose_qparams_symmetric.tensor", 0)]
)
def test_qparams_of_no_values_are_those_of_zero(name, zero_point):
    """A batch of no rows, in a model of dynamic sizes: the smallest scale, and zero is exact."""
    scale, found = overload(THEIRS, name)(torch.rand(0, 8), -128, 127, 0.25, torch.int8)
    assert (scale.item(), found.item()) == (0.25, zero_point)
